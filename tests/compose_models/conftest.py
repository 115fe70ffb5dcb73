from tests.tiny_models import one_thread, reference_backend

__all__ = ["one_thread", "reference_backend"]
