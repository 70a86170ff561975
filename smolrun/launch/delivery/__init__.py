"""Brings to hosts what a run needs there, and back what it wrote: code, data, models, checkpoints.

    driver                                              host, below its workdir
    code_archive.py  which files are code; one archive of them, and its hash
    code.py          ------------------------------->   code/<sha16>/, or tree/
    versions.py      do the libraries there fit?        envs/<name>/
    files.py         data and models, by content ---->  files/<sha256>/
    run_folder.py    the checkpoint to go on from --->  runs/<run_id>/resume/
    shards.py        <-------- what the ranks saved     runs/<run_id>/checkpoints/
    provision.py     all of it, on all hosts at once

Everything travels under a name of its own, is compared with its hash over there, and gets its
place by one rename: a host that loses power, or two drivers at once, leave nothing half done. The
host's half is in `on_host/`. Nothing here knows how a host is reached.
"""
