"""The scripts that tests start as processes are no tests."""

collect_ignore_glob = ["run_*.py"]
