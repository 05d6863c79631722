"""Publishes in two processes, under any huggingface_hub: `PYTHON publish_worker.py STEP ...`.

`send DIRECTORY REPO` sends every file and prints what another process needs to go on; `commit
DIRECTORY REPO` reads that from stdin, restores what is stored, adds the rest, and commits.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path


def main(step: str, directory: Path, repo: str) -> None:
    import huggingface_hub

    from nf4cli.hub.publish import Publication, Uploaded

    publication = Publication(repo)
    publication.prepare()
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*.*"))
    if step == "send":
        sent = [publication.add(directory / name, name) for name in names]
        documents = [
            {
                "name": u.name, "size": u.size, "sha256": u.sha256, "stored": u.stored,
                "sample": base64.b64encode(u.sample).decode(),
            }
            for u in sent
        ]  # fmt: skip
        print(json.dumps({"client": huggingface_hub.__version__, "sent": documents}))
        return
    for u in json.load(sys.stdin)["sent"]:
        if u["stored"]:
            publication.restore(Uploaded(**{**u, "sample": base64.b64decode(u["sample"])}))
    for name in names:
        publication.add(directory / name, name)
    published = publication.commit("made of two processes")
    print(json.dumps({"commit": published.commit, "changed": published.changed}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
