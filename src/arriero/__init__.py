"""arriero: LLM serving that moves requests while they run."""

__version__ = "0.1.0"
