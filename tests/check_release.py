"""`make release`, whole, against a registry: built twice, compared, pushed by digest, tagged last, pulled and run."""

import json
import os
import secrets
import subprocess

import pytest

import main
from tests.harness import HERE, NAME, PYTHONS, Image, check_contract, make, missing, run

REGISTRY = os.environ.get("REGISTRY", "127.0.0.1:5000")
BUILDER = os.environ.setdefault("BUILDX_BUILDER", "release")
PLATFORMS = ("linux/amd64", "linux/arm64")


@pytest.fixture(scope="module")
def released(engine) -> tuple[str, str]:
    """The image's name in the registry, and what `make release` printed last: its name by digest."""
    if subprocess.run([engine, "buildx", "inspect", BUILDER], capture_output=True, check=False).returncode:
        missing(f"there is no builder: docker buildx create --name {BUILDER} --driver docker-container --bootstrap")
    name = f"{REGISTRY}/{NAME}-{secrets.token_hex(4)}"  # where no run before this one has left a tag
    said = run("make", "release", f"ENGINE={engine}", f"IMAGE={name}", f"TAG=v{main.app.version}", cwd=HERE)
    return name, said.splitlines()[-1]


def inspect(engine: str, image: str, template: str) -> str:
    return run(engine, "buildx", "imagetools", "inspect", "--format", template, image)


@pytest.mark.check
def test_release_refuses_a_tag_that_is_not_the_version(engine):
    status, output = make("release", f"ENGINE={engine}", "TAG=v0.0.0")
    assert status != 0
    assert f"TAG=v0.0.0: the version in main.py is {main.app.version}" in output


@pytest.mark.check
def test_release_is_found_by_its_digest_alone_until_it_is_tagged(engine, released):
    name, digest = released
    assert digest.startswith(f"{name}@sha256:")
    with pytest.raises(AssertionError, match="not found"):
        inspect(engine, f"{name}:{main.app.version}", "{{json .Manifest}}")
    run(engine, "buildx", "imagetools", "create", "--tag", f"{name}:{main.app.version}", digest)
    assert json.loads(inspect(engine, f"{name}:{main.app.version}", "{{json .Manifest}}"))["digest"] in digest


@pytest.mark.check
@pytest.mark.contract
@pytest.mark.parametrize("platform", PLATFORMS)
def test_release_runs_once_pulled(engine, released, platform):
    _, digest = released
    run(engine, "pull", "--platform", platform, digest)
    flags = (f"--platform={platform}", "--tmpfs=/tmp", "--memory=256m")
    with Image(engine, PYTHONS[0], digest, *flags).container() as container:
        check_contract(container.url)
        status, _ = container.stop()
    assert status == 0


@pytest.mark.check
@pytest.mark.parametrize("platform", PLATFORMS)
def test_release_says_what_is_in_it_and_how_it_was_built(engine, released, platform):
    _, digest = released
    packages = json.loads(inspect(engine, digest, f'{{{{json (index .SBOM "{platform}").SPDX.packages}}}}'))
    assert {"fastapi", "uvicorn", "libc6"} <= {package["name"] for package in packages}
    assert "buildType" in inspect(engine, digest, f'{{{{json (index .Provenance "{platform}").SLSA}}}}')
