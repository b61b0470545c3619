"""Executes a notebook in a folder; fails where a cell does: `run_notebook.py NOTEBOOK FOLDER`."""

import sys

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def main() -> None:
    path, folder = sys.argv[1:]
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": folder}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    try:
        client.execute()
    except CellExecutionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
