"""Commands in documents: fenced blocks marked `bash` are run, in order, as a reader would type them.

`python tests/repo/documents.py README.md` copies the repository to a scratch folder and runs the blocks of the
document there, with `.venv/bin` of that folder first on the path and `DRY_RUN=1`, so that launchers only print.
Threads wait asleep (`OMP_WAIT_POLICY`), since waiting awake takes the core from the very thread that is waited for where
the machine is busy: a 576 x 576 eigh took 500-1400 ms instead of 36-50 ms on two cores at load 5.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.repo.tree import ROOT, tracked

SECONDS = 1500
FENCE = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    place: str
    language: str
    text: str


def blocks(text: str, name: str = "") -> list[Block]:
    """Fenced blocks of a Markdown text.

    >>> blocks("Run:\\n```bash\\necho hello\\n```\\n")[0].text
    'echo hello\\n'
    """
    return [Block(f"{name}:{text[: match.start()].count(chr(10)) + 1}", match["language"], match["text"]) for match in FENCE.finditer(text)]


def copy(tree: Path) -> None:
    """Copy the repository's own files to `tree`; links stay links."""
    for path in tracked():
        target = tree / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", help="Documents, relative to the root.")
    parser.add_argument("--skip", default="", help="Leave out blocks that contain this word.")
    parser.add_argument("--first", action="store_true", help="Only the first block.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="documents-") as folder:
        tree = Path(folder) / "tree"
        copy(tree)
        subprocess.run([sys.executable, "-m", "venv", str(tree / ".venv")], check=True)
        # Python writes the bytecode of what it imports; pip would write that of everything, 52 of 93 processor seconds of an installation
        bytecode = {"PIP_COMPILE": "0", "PYTHONDONTWRITEBYTECODE": ""}
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, **bytecode, "DRY_RUN": "1"}
        path = os.pathsep.join([str(tree / ".venv/bin"), os.environ["PATH"], str(Path(sys.executable).parent)])
        for name in options.documents:
            chosen = [block for block in blocks((ROOT / name).read_text(), name) if block.language == "bash"]
            for block in chosen[: 1 if options.first else None]:
                if options.skip and re.search(rf"\b{options.skip}\b", block.text):
                    continue
                print(f"--- {block.place}\n{block.text}", flush=True)
                command = ["bash", "-euo", "pipefail", "-c", block.text]
                code = subprocess.run(command, cwd=tree, env={**environment, "PATH": path}, timeout=SECONDS).returncode
                if code:
                    print(f"--- {block.place} failed with exit code {code}", flush=True)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
