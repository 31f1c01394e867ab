"""Shared by the tests of the engine's inside."""

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The micro model."""
    from micro import World  # it imports torch, which most tests of the command line do without

    return World(tmp_path_factory.mktemp("micro"))
