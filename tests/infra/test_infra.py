"""The files of `infra/`: they parse, name what exists, and say what the planner says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from arriero.router.tls import LINK_NAME, TlsFiles

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"


def test_links_lead_somewhere() -> None:
    for file in INFRA.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file}: {link}"


@pytest.mark.parametrize("script", sorted(INFRA.rglob("*.sh")), ids=lambda one: one.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o100


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_certificates_are_believed(tmp_path: Path) -> None:
    made = [str(INFRA / "tls/make-certs.sh"), str(tmp_path), "gateway.example", "127.0.0.1"]
    subprocess.run(made, check=True, capture_output=True)
    subprocess.run(made, check=True, capture_output=True)  # again, under the same authority
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "gateway.pem", tmp_path / "gateway.key")
    checked = subprocess.run(
        ["openssl", "verify", "-CAfile", "ca.pem", "-verify_hostname", "gateway.example",
         "gateway.pem"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert (tmp_path / "gateway.key").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_a_links_certificate_is_believed_at_both_ends(tmp_path: Path) -> None:
    script = str(INFRA / "tls/make-certs.sh")
    environment = os.environ | {"FILE": "link"}
    subprocess.run([script, str(tmp_path), LINK_NAME], env=environment, check=True,
                   capture_output=True)  # fmt: skip
    files = TlsFiles(
        certificate=tmp_path / "link.pem", key=tmp_path / "link.key", ca=tmp_path / "ca.pem"
    )
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = files.link_server("link_tls").wrap_bio(ours, theirs, server_side=True)
    client = files.link_client("link_tls").wrap_bio(theirs, ours, server_hostname=LINK_NAME)
    for _ in range(4):
        for end in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert client.getpeercert() and server.getpeercert()


def test_the_dockerfile_copies_what_exists() -> None:
    text = (INFRA / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / line).exists()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert stages == ["build", "cpu", "cuda"]


def test_every_network_setting_has_a_value_and_a_reason() -> None:
    rows = re.findall(
        r"^\| `(.+?)` \| (.+?) \| (.+?) \|$",
        (INFRA / "nccl/README.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 8
    for names, value, why in rows:
        assert all(re.fullmatch(r"[A-Z][A-Z0-9_]+", one) for one in names.split("`, `")), names
        assert value and len(why.split()) > 5, names
    told = {one for names, _, _ in rows for one in names.split("`, `")}
    used = set()
    for file in [*(INFRA / "kubernetes").rglob("*.yaml"), *(INFRA / "metal").glob("*.sh")]:
        used |= set(re.findall(r"\b((?:NCCL|GLOO|TORCH_NCCL)_[A-Z_]+)\b", file.read_text()))
    assert used and used <= told, used - told
