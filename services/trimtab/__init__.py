"""trimtab: align a language model with what people prefer, as a suite of gRPC services."""

__version__ = "0.1.0"
