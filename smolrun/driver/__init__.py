"""One run from the driver's side: preflight, hosts, resume, restart. May read the config."""
