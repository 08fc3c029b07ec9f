"""Certificates made in the test: an authority that issues servers' and clients' certificates as PEM files."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
HOUR = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """A certificate authority; `issue` writes NAME.pem and NAME.key."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        """A new one, its own certificate at `folder`/ca.pem."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        basic = x509.BasicConstraints(ca=True, path_length=None)
        certificate = _builder("ca", None, key).add_extension(basic, critical=True).sign(key, hashes.SHA256())
        authority = cls(folder, key, certificate)
        authority.write("ca", certificate, key)
        return authority

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def issue(self, name: str, *names: x509.GeneralName, ended: bool = False) -> tuple[Path, Path]:
        """A certificate for `names`, over its last day an hour ago where it has `ended`."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, self.certificate.subject, key, ended=ended)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return self.write(name, builder.sign(self.key, hashes.SHA256()), key)

    def write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        certificate_path, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate_path, key_path


def _builder(
    name: str, issuer: x509.Name | None, key: ec.EllipticCurvePrivateKey, *, ended: bool = False
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * HOUR)
        .not_valid_after(now - HOUR if ended else now + HOUR)
    )
