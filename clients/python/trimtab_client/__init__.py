"""trimtab SDK."""

from trimtab_client.ragged import RaggedError, RaggedFloats, RaggedTokens
from trimtab_client.versions import AtLeast, ModelVersion, VersionPin

__all__ = ["AtLeast", "ModelVersion", "RaggedError", "RaggedFloats", "RaggedTokens", "VersionPin"]
