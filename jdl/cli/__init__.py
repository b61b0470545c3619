"""The command `jdl`: one file for each command, imported only when it runs."""
