"""How labeling's port is secured: its own certificate, renewed while it serves, and no roles but its own."""

import shutil
import ssl

import pytest
from pydantic import ValidationError

from tests.services.authority import LOOPBACK, Authority
from tests.services.labeling.browser import run_server
from trimtab.labeling.config import LabelingConfig


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path):
    authority = Authority.make(tmp_path / "authority")
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    first, second = authority.issue("first", LOOPBACK), authority.issue("second", LOOPBACK)
    shutil.copy(first[0], cert)
    shutil.copy(first[1], key)
    settings = {"tls_cert": str(cert), "tls_key": str(key), "feed": False}
    with run_server(str(tmp_path / "labels.sqlite"), **settings) as address:
        port = int(address.rpartition(":")[2])

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", port), timeout=20)

        assert shown() == first[0].read_text()
        shutil.copy(second[1], key)  # half of a renewal
        assert shown() == first[0].read_text()
        shutil.copy(second[0], cert)
        assert shown() == second[0].read_text()


def test_roles_of_the_other_services_are_refused_rather_than_passed_over(tmp_path):
    with pytest.raises(ValidationError, match="labeling knows people by its own sign-in and tokens"):
        LabelingConfig.model_validate({"auth": {"keys_file": str(tmp_path / "keys.yaml")}})
