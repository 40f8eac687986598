"""Training of the reference model: drawn scenes with captions, photographs from packages, rectified flow.

The model is the starter repository's own (`templates/flux-starter`), which this package makes importable as `flux`.
"""

import sys
from pathlib import Path

STARTER = Path(__file__).parents[1] / "templates" / "flux-starter"
if str(STARTER) not in sys.path:
    sys.path.insert(0, str(STARTER))
