"""The terminal dashboard: `run_state` keeps what is known of a run, `drawing` and `screen` make
text of it, `sources` read it, `dashboard` shows it by textual. web/ is the source of the chat page.
"""
