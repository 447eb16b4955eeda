"""The image for arm64, on an engine that runs it, by emulation where this machine is another."""

import subprocess

import pytest

from tests.harness import NAME, PYTHONS, Image, answers, check_contract, check_size, missing, run, scan, wait_until

PLATFORM = "linux/arm64"


@pytest.fixture(scope="module")
def arm64(engine):
    """The image for arm64, which runs there."""
    base = f"python:{PYTHONS[0]}-slim"
    command = (engine, "run", "--rm", f"--platform={PLATFORM}", base, "python3", "-c")
    says = subprocess.run(
        [*command, "import os; print(os.uname().machine)"], capture_output=True, text=True, check=False
    )
    if says.stdout.strip() != "aarch64":
        missing(
            f"{engine} runs no {PLATFORM}: install QEMU's user emulation and pull {base} for it ({says.stderr[-200:]})"
        )
    name = f"{NAME}:arm64"
    run("make", "build", f"ENGINE={engine}", f"IMAGE={name}", f"PLATFORM={PLATFORM}")
    return Image(engine, PYTHONS[0], name, f"--platform={PLATFORM}")


@pytest.mark.contract
def test_arm64_image_holds_the_contract_under_strict_settings_and_stops_cleanly(arm64):
    with arm64.container(flags=("--tmpfs=/tmp", "--memory=256m", "--stop-timeout=60"), ready=False) as container:
        wait_until(lambda: answers(container.url), 300)  # which emulation takes
        check_contract(container.url)
        assert container.python_says("import os; print(os.uname().machine)") == "aarch64"
        check = ("--env=HANG_SECONDS=60", container.id, *container.inspect("Config.Healthcheck.Test")[1:])
        run(arm64.engine, "exec", *check)
        status, _ = container.stop()
    assert status == 0


def test_arm64_image_is_as_small_and_its_packages_are_found(arm64, tmp_path):
    archive = tmp_path / "root.tar"
    container = run(arm64.engine, "create", f"--platform={PLATFORM}", arm64.name)
    run(arm64.engine, "export", "--output", archive, container)
    run(arm64.engine, "rm", container)
    check_size(arm64, archive)
    found = scan(archive, tmp_path / "root")
    names = {package["name"] for package in found}
    assert {"libc6", "libssl3t64", "ca-certificates", "fastapi", "uvicorn", "pydantic-core"} <= names
    architectures = {package["metadata"].get("architecture") for package in found if package["type"] == "deb"}
    assert architectures <= {"arm64", "all"}
