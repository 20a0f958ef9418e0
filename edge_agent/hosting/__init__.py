"""How models are hosted: which files are configured, each release in an engine of its own, and the hand-over to the next one."""

from edge_agent.hosting.files import built_model, language_models, model_files, models_folder
from edge_agent.hosting.host import Host

__all__ = ["Host", "built_model", "language_models", "model_files", "models_folder"]
