"""Delivers code, data, models and checkpoints to hosts, and fetches the shards that ranks saved.

    driver                                              host, below its workdir
    code_archive.py  which files are code; one archive of them, and its hash
    code.py          ------------------------------->   code/<sha16>/, or tree/
    versions.py      compares library versions          envs/<name>/
    files.py         data and models, by content ---->  files/<sha256>/
    run_folder.py    the checkpoint to resume ------->  runs/<run_id>/resume/
    shards.py        <-------- what the ranks saved     runs/<run_id>/checkpoints/
    provision.py     all of it, on all hosts at once

Everything is copied under a temporary name, compared with its hash on the host, and renamed into
place: a host that loses power, or two drivers at once, leave nothing half done. The
host's half is in `on_host/`. Nothing here knows how a host is reached.
"""
