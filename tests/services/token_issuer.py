"""An issuer of JSON Web Tokens made in the test: signs tokens, writes its key set."""

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm


class TokenIssuer:
    """One issuer with one key of its own; `rotate` takes another."""

    def __init__(self, issuer: str = "https://issuer.example", audience: str = "trimtab") -> None:
        self.issuer = issuer
        self.audience = audience
        self._count = 0
        self.rotate()

    def rotate(self) -> None:
        self._count += 1
        self.key_id = f"key-{self._count}"
        self._key = ec.generate_private_key(ec.SECP256R1())

    @property
    def key_set(self) -> dict[str, Any]:
        public = json.loads(ECAlgorithm.to_jwk(self._key.public_key()))
        return {"keys": [{**public, "kid": self.key_id, "use": "sig", "alg": "ES256"}]}

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(self.key_set))
        return path

    def token(self, subject: str, *, ends_in_s: float = 600, algorithm: str = "ES256", **claims: Any) -> str:
        """A token; a claim that is None is left out."""
        now_s = int(time.time())
        given = {"iss": self.issuer, "aud": self.audience, "sub": subject, "iat": now_s, "exp": now_s + ends_in_s}
        content = {name: value for name, value in {**given, **claims}.items() if value is not None}
        key: Any = self._key if algorithm == "ES256" else "" if algorithm == "none" else "shared secret " * 4
        return jwt.encode(content, key, algorithm=algorithm, headers={"kid": self.key_id})
