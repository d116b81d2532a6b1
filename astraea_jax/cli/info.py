"""`astraea info`: what runs on this machine."""


def command() -> None:
    """Says what runs on this machine, and why the rest does not."""
    import jax

    from astraea_jax import report
    from astraea_jax.cli import compiled
    from astraea_jax.kernels import dispatch
    from astraea_jax.methods import METHODS

    rows = [{"what": name, "value": value} for name, value in report.environment().items()]
    rows += [
        {"what": f"attention: {name}", "value": state}
        for name, state in dispatch.implementations().items()
    ]
    rows.append({"what": "methods", "value": ", ".join(METHODS)})
    folder = jax.config.jax_compilation_cache_dir or compiled.folder() or compiled.NO_HOME
    rows.append({"what": "compiled programs", "value": str(folder)})
    report.show(report.table(rows, {"what": "", "value": ""}))
