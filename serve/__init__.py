"""The command line and the server. Before anything large is imported, it is made sure that its bytecode is at hand."""

from ingot.artifacts.bytecode import use_bytecode_cache

use_bytecode_cache()
