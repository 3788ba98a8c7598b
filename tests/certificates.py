"""A certificate for servers under test, which nobody has signed but itself."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

from needs import need

REQUEST = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost")


class Certificate:
    """In a folder of its own: for a server's configuration, and for a client that trusts any."""

    def __init__(self, folder: Path) -> None:
        openssl = shutil.which("openssl")
        need(openssl is not None, "openssl makes the certificate")
        self.key, self.file = folder / "key.pem", folder / "cert.pem"
        subprocess.run([str(openssl), *REQUEST, "-keyout", self.key, "-out", self.file], check=True, capture_output=True)
        self.settings = f"keyfile, certfile = {str(self.key)!r}, {str(self.file)!r}"
        self.client = ssl.create_default_context()
        self.client.check_hostname = False
        self.client.verify_mode = ssl.CERT_NONE
