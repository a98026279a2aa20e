from __future__ import annotations

from dataclasses import replace

import pytest

from asyncrl.cli.doctor import GIB, Check, examine, print_report
from asyncrl.installation import Device, Installation, inspect_installation

OWN = ["torch>=2.11", "transformers<5.20,>=5.16.1", 'vllm<0.33,>=0.32; extra == "vllm"']
VLLM = ["torch==2.13.0", "transformers<5.20.0,>=5.16.1", "torchvision"]
GPU = Device("cuda", "H200", 130 * GIB, 139 * GIB)

GOOD = Installation(
    versions={"torch": "2.13.0+cu130", "transformers": "5.19.0", "vllm": "0.32.0"},
    requires={"asyncrl": OWN, "vllm": VLLM},
    device=GPU,
    memory_bytes=64 * GIB,
    disk_bytes=64 * GIB,
    extras={"wandb": False},
)


def found(here: Installation, name: str) -> Check:
    (check,) = [check for check in examine(here) if check.name == name]
    return check


def states(here: Installation) -> set[str]:
    return {check.state for check in examine(here)}


def test_a_good_gpu_machine_uses_vllm() -> None:
    assert states(GOOD) == {"ok"}
    assert found(GOOD, "sampler").found.startswith("vllm: there is a CUDA device")
    assert found(GOOD, "device").found == "cuda (H200, 130.0 GiB of 139.0 GiB free)"
    assert "pip install 'asyncrl[wandb]'" in found(GOOD, "trackers").mend


def test_a_laptop_uses_the_embedded_sampler() -> None:
    here = replace(GOOD, device=Device("mps", "Apple GPU"), versions={"torch": "2.13.0", "transformers": "5.19.0"})
    assert found(here, "sampler").found.startswith("transformers: ")
    assert found(here, "vllm").state == "note"
    assert "docs/vllm.md" in found(here, "vllm").mend


def test_vllm_for_another_torch_is_named_and_not_chosen() -> None:
    here = replace(GOOD, versions=GOOD.versions | {"torch": "2.14.0"})
    assert found(here, "vllm").found == "0.32.0 was made for torch==2.13.0, but torch is 2.14.0"
    assert found(here, "sampler").found.startswith("transformers: there is a CUDA device, but no vLLM that fits")
    assert "wrong" not in states(here)


def test_vllm_that_asyncrl_was_not_made_for() -> None:
    here = replace(GOOD, versions=GOOD.versions | {"vllm": "0.26.0"})
    assert "asyncrl was made for vllm<0.33,>=0.32" in found(here, "vllm").found


@pytest.mark.parametrize(
    ("versions", "package", "mend"),
    [
        ({"transformers": "5.19.0"}, "torch", "pip install 'torch>=2.11'"),
        ({"torch": "2.9.0", "transformers": "5.19.0"}, "torch", "pip install 'torch>=2.11'"),
        ({"torch": "2.13.0", "transformers": "5.20.1"}, "transformers", "pip install 'transformers<5.20,>=5.16.1'"),
    ],
)
def test_a_package_that_is_missing_or_too_old_stops_a_run(versions: dict[str, str], package: str, mend: str) -> None:
    check = found(replace(GOOD, versions=versions), package)
    assert (check.state, check.mend) == ("wrong", mend)


def test_a_torchvision_for_another_torch_stops_a_run() -> None:
    here = replace(
        GOOD,
        versions=GOOD.versions | {"torchvision": "0.28.0"},
        requires={**GOOD.requires, "torchvision": ["torch==2.14.0"]},
    )
    assert found(here, "torchvision").mend == "pip uninstall -y torchvision"


def test_torch_that_cannot_be_imported_stops_a_run() -> None:
    check = found(replace(GOOD, device=None, torch_error="libcudart.so.13: cannot open"), "device")
    assert check.state == "wrong"
    assert "libcudart" in check.found


def test_little_room_is_a_note_and_no_rights_stop_a_run() -> None:
    here = replace(GOOD, memory_bytes=GIB, disk_bytes=GIB)
    assert (found(here, "memory").state, found(here, "disk").state) == ("note", "note")
    assert found(replace(GOOD, writable=False), "folder").state == "wrong"


def test_this_machine_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    checks = examine(inspect_installation())
    assert {"torch", "device", "sampler"} <= {check.name for check in checks}
    print_report(checks)
    assert "A run can" in capsys.readouterr().out


def test_the_report_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    print_report([Check("torch", "wrong", "missing, needed: >=2.11", "pip install 'torch>=2.11'")])
    out = capsys.readouterr().out
    assert "-> pip install 'torch>=2.11'" in out
    assert "A run cannot start: 1 to mend." in out
