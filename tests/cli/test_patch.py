"""patch, diff, status, revert and apply on the starter repository, through real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import chipmunk, environment, in_terminal

Snapshot = Callable[[Path], dict[str, bytes]]

NOT_FLUX = """\
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
"""


NO_MODEL = "no FLUX model that can be patched was found"

NEARLY_FLUX = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([Pair()])
        self.single_blocks = nn.ModuleList([One()])

    def forward(self, img, txt):
        for block in self.double_blocks:
            img, txt = block(img, txt)
        x = self.join(torch.cat, (txt, img))
        for block in self.single_blocks:
            x = block(x)
        return self.cut(torch.cat((x,)), txt)
"""
"""How the streams are joined is out of sight."""


def git_apply(patch: bytes, folder: Path, *options: str) -> int:
    done = subprocess.run(["git", "apply", *options, "-"], input=patch, cwd=folder, check=False)
    return done.returncode


def test_the_plan_names_each_site_with_file_line_code_and_reason(starter: Path, snapshot: Snapshot) -> None:
    before = snapshot(starter)
    done = chipmunk("patch", starter, "--dry-run")
    assert done.code == 0
    assert snapshot(starter) == before
    assert "Model  Flux in flux/model.py" in done.lines
    files = [line for line in done.lines if line.endswith(".py") and not line.startswith((" ", "Model"))]
    assert files == ["flux/cli.py", "flux/math.py", "flux/model.py", "flux/modules/layers.py", "flux/sampling.py"]
    code = (starter / "flux/sampling.py").read_text().splitlines()
    (clock,) = [line for line in done.lines if "step-clock" in line]
    number, status, _, matched = clock.split(maxsplit=3)
    assert status == "patch"
    assert matched in code[int(number) - 1]
    assert f"chipmunk patch {starter}" in done.out


def test_patch_then_again_then_revert(starter: Path, snapshot: Snapshot) -> None:
    before = snapshot(starter)
    first = chipmunk("patch", starter)
    assert first.code == 0
    assert "Patched 5 files" in first.out
    for command in ("diff", "verify", "config init", "revert"):
        assert f"chipmunk {command} {starter}" in first.out
    after = snapshot(starter)
    second = chipmunk("patch", starter)
    assert second.code == 0
    assert "Nothing to do" in second.out
    assert snapshot(starter) == after
    reverted = chipmunk("revert", starter)
    assert reverted.code == 0
    assert reverted.out.count("to the byte") == 5
    assert snapshot(starter) == before
    assert chipmunk("revert", starter).out == "Nothing to do: the repository is not patched.\n"


def test_check_finds_work_or_none_and_writes_nothing(starter: Path, patched: Path, snapshot: Snapshot) -> None:
    before = snapshot(starter)
    for command in ("patch", "diff"):
        assert chipmunk(command, starter, "--check").code == 1
        assert chipmunk(command, patched, "--check").code == 0
    assert snapshot(starter) == before


def test_only_takes_names_separated_by_commas(starter: Path) -> None:
    found = json.loads(chipmunk("patch", starter, "--dry-run", "--json", "--only", "attention,step-clock").out)
    assert {site["patch"] for site in found["sites"]} == {"attention", "step-clock", "model-forward"}
    both = json.loads(chipmunk("patch", starter, "--dry-run", "--json", "--only", "mlp").out)
    assert {"double-mlp", "single-mlp"} <= {site["patch"] for site in both["sites"]}


def test_json_is_one_exact_object(starter: Path, patched: Path) -> None:
    planned = json.loads(chipmunk("patch", starter, "--dry-run", "--json").out)
    assert (planned["status"], planned["target"]) == ("unpatched", "flux")
    assert planned["lines"]["added"] >= planned["lines"]["in_forward"] > 0
    for site in planned["sites"]:
        assert set(site) == {"file", "line", "patch", "status", "matched", "reason"}
        assert site["status"] == "patched"
        assert site["line"] >= 1
    split = next(site for site in planned["sites"] if "torch.split" in site["matched"])
    assert "[3 * self.hidden_size, self.mlp_hidden_dim]" in split["matched"]
    done = json.loads(chipmunk("patch", starter, "--json").out)
    assert done == {**planned, "status": "patched"}
    again = json.loads(chipmunk("patch", starter, "--json").out)
    assert (again["status"], again["files"]) == ("up to date", [])
    assert {site["status"] for site in again["sites"]} == {"already patched"}
    found = json.loads(chipmunk("status", starter, "--json").out)
    assert (found["status"], found["files"]) == ("patched", planned["files"])
    assert set(found["states"].values()) == {"patched"}
    reverted = json.loads(chipmunk("revert", starter, "--json").out)
    assert (reverted["status"], reverted["target"], reverted["files"]) == ("unpatched", "flux", planned["files"])
    shown = json.loads(chipmunk("diff", patched, "--json").out)
    assert shown["status"] == "patched"
    assert shown["diff"] == chipmunk("diff", patched).out


def test_a_piped_diff_is_a_patch_before_and_after_patching(starter: Path, patched: Path, tmp_path: Path) -> None:
    before = subprocess.run(
        [sys.executable, "-m", "chipmunk.cli", "diff", str(starter)],
        capture_output=True,
        check=True,
        env=environment(COLUMNS="40"),
    ).stdout
    assert git_apply(before, starter, "--check") == 0
    assert git_apply(before, patched, "--check") != 0
    assert chipmunk("diff", patched).out.encode() == before
    written = chipmunk("diff", starter, "--output", tmp_path / "x.patch")
    assert (written.code, written.out) == (0, "")
    assert (tmp_path / "x.patch").read_bytes() == before


def test_bytes_of_the_users_files_go_through_a_pipe_unchanged(starter: Path) -> None:
    sampling = starter / "flux/sampling.py"
    text = (
        sampling.read_bytes().replace(b"\n", b"\r\n").replace(b"import math", "import math  # [str] é\x1b[31m".encode())
    )
    sampling.write_bytes(text.rstrip(b"\r\n"))
    diff = subprocess.run(
        [sys.executable, "-m", "chipmunk.cli", "diff", str(starter)],
        capture_output=True,
        check=True,
        env=environment(PYTHONIOENCODING="ascii"),
    ).stdout
    assert "# [str] é\x1b[31m\r\n".encode() in diff
    assert git_apply(diff, starter, "--check") == 0


def test_the_terminal_never_obeys_the_users_code(starter: Path) -> None:
    sampling = starter / "flux/sampling.py"
    comment = "  # [bold] [/] [str] \x1b]0;owned\x07"
    sampling.write_text(sampling.read_text().replace("import math", "import math" + comment))
    shown = in_terminal("diff", starter, columns=100)
    assert shown.code == 0
    assert "# [bold] [/] [str] \\x1b]0;owned\\x07" in shown.out
    assert "\x1b]0;" not in shown.out


@pytest.mark.parametrize("columns", [80, 120])
def test_in_a_terminal_the_plan_fits_the_width(starter: Path, columns: int) -> None:
    shown = in_terminal("patch", starter, "--dry-run", columns=columns)
    assert shown.code == 0
    assert "\x1b[" in shown.out
    lines = plain(shown.out).splitlines()
    sites = [line for line in lines if line[8:].startswith("patch ")]
    assert len(sites) == 11
    assert all(len(line) <= columns for line in lines if not line.startswith("  chipmunk "))
    assert any("scaled_dot_product_attention(q, k, v)" in line for line in lines)


@pytest.mark.parametrize(("columns", "beside"), [(159, False), (160, True), (220, True)])
def test_in_a_wide_terminal_the_two_sides_stand_beside_each_other(starter: Path, columns: int, beside: bool) -> None:
    lines = plain(in_terminal("diff", starter, columns=columns).out).splitlines()
    loop = [line for line in lines if "zip(timesteps[:-1], timesteps[1:])" in line]
    assert len(loop) == (1 if beside else 2)
    if beside:
        assert all(len(line) <= columns for line in lines)
        left, _, right = loop[0].partition(" │ ")
        assert "in zip(" in left
        assert "in chipmunk.steps(model, zip(" in right


def plain(text: str) -> str:
    """Text without colours."""
    parts = text.split("\x1b[")
    return parts[0] + "".join(part.partition("m")[2] for part in parts[1:])


def test_status_of_each_state(starter: Path, patched: Path) -> None:
    assert chipmunk("status", starter).lines[0].endswith(": unpatched")
    done = chipmunk("status", patched)
    assert done.code == 0
    assert done.lines[0].endswith(": patched")
    assert f"chipmunk revert {patched}" in done.out
    sampling = patched / "flux/sampling.py"
    sampling.write_text("# mine\n\n" + sampling.read_text())
    edited = json.loads(chipmunk("status", patched, "--json").out)
    assert edited["status"] == "patched and edited since"
    assert edited["states"]["flux/sampling.py"] == "edited since"
    (site,) = [site for site in edited["sites"] if site["patch"] == "step-clock"]
    assert "chipmunk.steps(" in sampling.read_text().splitlines()[site["line"] - 1]


def test_reverting_keeps_the_users_edits_or_refuses(patched: Path, snapshot: Snapshot) -> None:
    sampling = patched / "flux/sampling.py"
    text = sampling.read_text()
    sampling.write_text(text.replace("chipmunk.steps(model, ", "chipmunk.steps(my_model, "))
    before = snapshot(patched)
    refused = chipmunk("revert", patched)
    assert refused.code == 3
    line = next(n for n, line in enumerate(sampling.read_text().splitlines(), 1) if "chipmunk.steps(my_model" in line)
    assert f"flux/sampling.py:{line}" in refused.err
    assert "\nNext   " in refused.err
    assert snapshot(patched) == before
    failed = json.loads(chipmunk("revert", patched, "--json").out)
    assert failed["status"] == "conflict"
    assert failed["error"]["places"][0]["line"] == line
    sampling.write_text("# mine\n" + text)
    done = chipmunk("revert", patched)
    assert done.code == 0
    assert "flux/sampling.py: restored, without Chipmunk's lines; your edits stay" in done.lines
    assert sampling.read_text().startswith("# mine\n")
    assert "chipmunk" not in sampling.read_text()


def test_apply_takes_a_saved_patch_to_another_copy(starter: Path, patched: Path, snapshot: Snapshot) -> None:
    patch = starter.parent / "x.patch"
    assert chipmunk("diff", patched, "-o", patch).code == 0
    sampling = starter / "flux/sampling.py"
    sampling.write_text("# moved\n# down\n" + sampling.read_text())
    before = snapshot(starter)
    assert chipmunk("apply", patch, starter, "--check").code == 1
    assert snapshot(starter) == before
    done = chipmunk("apply", patch, starter)
    assert done.code == 0
    assert "2 lines further down" in done.out
    assert chipmunk("apply", patch, starter).out.endswith("Nothing to do: the change is there already.\n")
    assert chipmunk("revert", starter).code == 0
    assert snapshot(starter) == before
    sampling.write_text(sampling.read_text().replace("zip(timesteps", "zip( timesteps"))
    before = snapshot(starter)
    refused = chipmunk("apply", patch, starter)
    assert refused.code == 3
    assert "flux/sampling.py" in refused.err
    assert snapshot(starter) == before


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "there is no such folder"),
        (lambda folder: folder.write_text("x = 1\n"), "is a file; give the folder it is in"),
        (lambda folder: folder.mkdir(), NO_MODEL),
        (
            lambda folder: (folder.mkdir(), (folder / "net.py").write_text(NOT_FLUX)),
            NO_MODEL,
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "broken.py").write_text("def f(:")),
            NO_MODEL,
        ),
    ],
)
def test_what_is_no_flux_repository_is_refused(
    make: Callable[[Path], object], says: str, tmp_path: Path, snapshot: Snapshot
) -> None:
    folder = tmp_path / "repository.py"
    make(folder)
    before = snapshot(tmp_path)
    for words in (["patch"], ["patch", "--json"], ["diff"]):
        done = chipmunk(words[0], folder, *words[1:])
        assert done.code == 2
        assert says in " ".join(done.err.split())
        assert "Next   chipmunk " in done.err
        if "--json" in words:
            found = json.loads(done.out)
            assert (found["status"], found["files"], found["sites"]) == ("refused", [], [])
        else:
            assert done.out == ""
    assert snapshot(tmp_path) == before


def test_a_model_in_a_file_that_cannot_be_parsed_is_refused_with_what_to_do(starter: Path, snapshot: Snapshot) -> None:
    model = starter / "flux/model.py"
    model.write_text(model.read_text() + "def f(:\n")
    before = snapshot(starter)
    done = chipmunk("patch", starter)
    assert done.code == 2
    assert "at     flux/model.py:" in done.err
    assert f"Next   chipmunk patch --dry-run {starter}" in done.err
    assert snapshot(starter) == before


def test_status_sends_nobody_to_a_revert_that_will_not_go(patched: Path) -> None:
    math = patched / "flux/math.py"
    math.write_text(math.read_text().replace("_attention, q, k, v", "_attention, q * 2, k, v"))
    assert chipmunk("revert", patched).code == 3
    done = chipmunk("status", patched)
    assert done.code == 0
    assert f"chipmunk diff {patched}" in done.out
    assert "chipmunk revert" not in done.out


def test_unknown_names_are_refused_with_the_known_ones(starter: Path) -> None:
    assert "Known: attention" in chipmunk("patch", starter, "--only", "attn").err
    assert (
        "Known: by-signature, comfyui, diffsynth, diffusers, flux" in chipmunk("patch", starter, "--target", "sd3").err
    )
    plugins = chipmunk("patch", starter, "--plugins", starter / "none")
    assert plugins.code == 2
    assert "does not exist" in plugins.err


def test_an_interrupted_run_is_put_right_by_the_next_one(starter: Path, snapshot: Snapshot) -> None:
    before = snapshot(starter)
    code = (
        "import os, signal, sys\n"
        "from chipmunk.apply import disk\n"
        "rename, seen = disk.rename, []\n"
        "def dying(a, b):\n"
        "    rename(a, b)\n"
        "    seen.append(b)\n"
        "    if sum(str(path).endswith('.py') for path in seen) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "disk.rename = dying\n"
        f"sys.argv = ['chipmunk', 'patch', {str(starter)!r}]\n"
        "from chipmunk.cli import main\n"
        "main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment())
    assert killed.returncode == -signal.SIGKILL
    assert json.loads(chipmunk("status", starter, "--json").out)["status"] == "interrupted"
    looked = chipmunk("diff", starter)
    assert (looked.code, looked.out) == (2, "")
    assert f"Next   chipmunk revert {starter}" in looked.err
    done = chipmunk("patch", starter)
    assert done.code == 0
    assert done.lines[0].startswith("An earlier run had been stopped half-way")
    assert chipmunk("revert", starter).code == 0
    assert snapshot(starter) == before


def test_ctrl_c_is_130_and_leaves_the_repository_whole(starter: Path, snapshot: Snapshot) -> None:
    before = snapshot(starter)
    plugins = starter.parent / "plugins"
    plugins.mkdir()
    plugin = '"""Waits."""\nNAME = "wait"\nAPI = 1\nimport time\n\n\ndef recognise(models, files):\n    '
    (plugins / "wait.py").write_text(plugin + "open('waiting', 'w').close()\n    time.sleep(60)\n    return False\n")
    (plugins / "aaa.py").write_text((plugins / "wait.py").read_text().replace('"wait"', '"aaa"'))
    process = subprocess.Popen(
        [sys.executable, "-c", PATCH_WITH_OWN_TARGETS, str(starter), str(plugins)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=starter.parent,
    )
    for _ in range(300):
        if (starter.parent / "waiting").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"interrupted; nothing is half-written" in errors
    assert b"Traceback" not in errors
    assert snapshot(starter) == before


# The built-in target recognises the starter at once: only those of the folder are asked here.
PATCH_WITH_OWN_TARGETS = """
import sys
from chipmunk import registry
load = registry.load
def loaded(plugins):
    found = load(plugins)
    del found.targets["flux"]
    return found
registry.load = loaded
sys.argv = ["chipmunk", "patch", sys.argv[1], "--plugins", sys.argv[2]]
from chipmunk.cli import main
main()
"""


def test_a_reader_that_stops_early_gets_no_traceback(starter: Path) -> None:
    command = f"{sys.executable} -m chipmunk.cli diff {starter} | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment())
    assert done.stdout.startswith("diff --git a/flux/cli.py")
    assert done.stderr == ""


def test_a_read_only_file_is_refused_before_anything_is_written(starter: Path, snapshot: Snapshot) -> None:
    (starter / "flux/sampling.py").chmod(0o444)
    before = snapshot(starter)
    refused = chipmunk("patch", starter)
    assert refused.code == 2
    assert "flux/sampling.py" in refused.err
    assert snapshot(starter) == before


def test_a_file_that_changes_meanwhile_is_a_conflict(starter: Path, tmp_path: Path) -> None:
    # what `patch` planned on is compared with the disk in the moment of writing
    code = (
        "import sys, pathlib\n"
        "from chipmunk import apply\n"
        "carry_out = apply.carry_out\n"
        "def late(update):\n"
        f"    path = pathlib.Path({str(starter)!r}) / 'flux/math.py'\n"
        "    path.write_bytes(path.read_bytes() + b'# later\\n')\n"
        "    carry_out(update)\n"
        "apply.carry_out = late\n"
        f"sys.argv = ['chipmunk', 'patch', {str(starter)!r}, '--json']\n"
        "from chipmunk.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 3
    assert json.loads(done.stdout)["status"] == "conflict"
    assert "flux/math.py" in done.stderr
    assert "chipmunk" not in (starter / "flux/sampling.py").read_text()


def test_paths_that_need_quoting_are_quoted_in_the_next_commands(starter: Path) -> None:
    odd = starter.parent / "my repository"
    shutil.move(starter, odd)
    done = chipmunk("patch", odd)
    assert done.code == 0
    assert f"chipmunk revert '{odd}'" in done.out


def test_a_script_with_a_pipeline_has_the_pipelines_loop(tmp_path: Path) -> None:
    (tmp_path / "draw.py").write_text(
        'from diffusers import FluxPipeline\n\npipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")\n'
        'pipe("a chipmunk")\n'
    )
    done = chipmunk("patch", tmp_path, "--dry-run")
    assert done.code == 0
    assert done.lines[0] == "Model  FluxTransformer2DModel of the installed diffusers"
    assert done.lines[1].strip() == "target: diffusers; sampling loops: the pipeline's own"
    assert "Would change 1 file: 2 lines added, 0 removed." in done.out


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_forward_with_two_lists_of_blocks_is_not_said_to_be_none(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "net.py").write_text(NEARLY_FLUX)
    done = chipmunk("patch", tmp_path, *words)
    assert done.code == 2
    message = " ".join(done.err.split())
    assert "no forward" not in message
    assert "what is nearest to one is left as it is" in message
    assert "net.py:11" in message
    assert "how the streams are joined, or which is the image, is not understood" in message
    assert (tmp_path / "net.py").read_text() == NEARLY_FLUX
