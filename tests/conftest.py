"""Settings that must stand before any test imports a library, and what no run may leave out."""

import os
from typing import NamedTuple

import torch

# No test may reach for the network, whoever starts the suite and however.
os.environ["HF_HUB_OFFLINE"] = "1"
# TRL warns on import that its ORPO is experimental; warnings are errors here.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# On a GPU, torch's deterministic mode (tests/kernels) asks for this before cuBLAS is loaded.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Without a GPU the Triton kernels themselves run in Triton's interpreter. It must be chosen
# before they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The files that run and compile the Triton kernels themselves. Peers' suites skip theirs without
# a GPU and are green; ours must not.
TRITON_FILES = "tests/kernels/test_triton_"


class TritonRun(NamedTuple):
    """What the run did with the tests of the Triton kernels."""

    passed: int
    skipped: int
    compiled_kernels: int
    was_asked_for: bool  # the whole suite was, not a selection of it

    @property
    def is_incomplete(self):
        return self.skipped > 0 or (self.was_asked_for and self.passed == 0)


def _triton_run(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = {
        outcome: [
            report
            for report in reporter.stats.get(outcome, [])
            if getattr(report, "nodeid", "").startswith(TRITON_FILES)
        ]
        for outcome in ("passed", "skipped")
    }
    passed = [report for report in reports["passed"] if report.when == "call"]
    option = config.option
    return TritonRun(
        len(passed),
        len(reports["skipped"]),
        sum(dict(report.user_properties).get("compiled_kernels", 0) for report in passed),
        not (option.keyword or option.markexpr or option.file_or_dir or option.collectonly),
    )


def pytest_terminal_summary(terminalreporter, config):
    run = _triton_run(config)
    if run.passed or run.is_incomplete:
        terminalreporter.write_line(
            f"Triton: {run.passed} tests of the kernels themselves passed, {run.compiled_kernels} "
            f"kernels compiled for cards that are not here, {run.skipped} tests skipped"
        )
    if run.is_incomplete:
        terminalreporter.write_line("No test of the Triton kernels may be left out.", red=True)


def pytest_sessionfinish(session, exitstatus):
    is_worker = hasattr(session.config, "workerinput")
    if exitstatus == 0 and not is_worker and _triton_run(session.config).is_incomplete:
        session.exitstatus = 1
