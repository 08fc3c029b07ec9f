"""The HTTP edge: REST scoring and generation, and the dialects that other systems speak, over the SDK."""
