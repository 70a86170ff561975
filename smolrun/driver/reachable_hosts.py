"""Which hosts of a cluster answer right now: asked after a loss, before a run is started again."""

from __future__ import annotations

from smolrun.config import RunConfig
from smolrun.config.plan import THIS_MACHINE
from smolrun.driver.fleet import host_specs


def who_answers(config: RunConfig) -> list[str]:
    """Their names, in the order of the cluster; this machine always does.

    Every other one is logged in to anew, all at once, within `cluster.connect_timeout_s` each.
    """
    hosts = config.cluster.hosts
    if hosts is None:
        return [THIS_MACHINE]
    specs = {spec.name: spec for spec in host_specs(config)}
    answers = {host.name: True for host in hosts if host.name not in specs}
    if specs:
        from smolrun.launch.remote.probe import HostSpec
        from smolrun.launch.run_on_all import run_on_all
        from smolrun.launch.ssh.connect import open_machine

        def ask(spec: HostSpec) -> bool:
            try:
                machine = open_machine(
                    spec,
                    ssh_config=config.cluster.ssh_config,
                    timeout_s=config.cluster.connect_timeout_s,
                    cluster=config.cluster.name,
                )
            except Exception:  # one that fails in a way of its own must not speak for the others
                return False
            machine.close()
            return True

        answers |= run_on_all(specs, ask, "ask")
    return [host.name for host in hosts if answers.get(host.name)]
