"""How ranks come to life, are watched and end: command line, launchers, supervision, `LLM`.

Importing this package does not import torch; ranks import it, their parent never does.
"""
