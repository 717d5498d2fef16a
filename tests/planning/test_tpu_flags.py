"""What the TPU compiler is asked for beside what the user asks for."""

import os

from lory_jax.tpu_flags import FLAGS, VARIABLE, set_tpu_flags


def test_flags_of_the_user_stay_and_are_not_repeated(monkeypatch):
    given = f"--{FLAGS[-1]}=false --xla_tpu_scoped_vmem_limit_kib=65536"
    monkeypatch.setenv(VARIABLE, given)
    set_tpu_flags()
    expected = [*given.split(), *(f"--{name}=true" for name in FLAGS[:-1])]
    assert os.environ[VARIABLE].split() == expected
    set_tpu_flags()
    assert os.environ[VARIABLE].split() == expected


def test_without_any_all_are_set(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    set_tpu_flags()
    assert os.environ[VARIABLE] == " ".join(f"--{name}=true" for name in FLAGS)
