"""How models are hosted: which files are configured, each release in an engine of its own, and the hand-over to the next one."""

from edge_agent.hosting.files import check_there, language_models, model_files, models_folder
from edge_agent.hosting.host import Host

__all__ = ["Host", "check_there", "language_models", "model_files", "models_folder"]
