"""The exception tree: built-in bases, messages and pickling with attributes."""

from __future__ import annotations

import pickle

import pytest

from userfault import errors

BUILTIN = {
    "ClosedError": (ValueError,),
    "ExportedError": (BufferError,),
    "RangeError": (IndexError, ValueError),
    "ModeError": (ValueError,),
    "OptionError": (ValueError,),
    "BudgetError": (ValueError,),
    "FormatError": (ValueError,),
    "TruncatedError": (errors.FormatError,),
    "UnsupportedDtypeError": (TypeError,),
    "SourcePickleError": (TypeError,),
    "MissingExtraError": (ImportError,),
    "SourceError": (OSError,),
    "SourceNotFoundError": (errors.SourceError, FileNotFoundError),
    "FlushError": (errors.SourceError, OSError),
    "ForkedError": (RuntimeError,),
    "TrackError": (RuntimeError,),
    "UntrackableError": (errors.TrackError,),
    "TraceError": (ValueError,),
    "PrivilegeError": (PermissionError,),
    "KernelError": (OSError,),
    "WorkerError": (RuntimeError,),
    "InternalError": (RuntimeError,),
}


def test_every_error_is_listed_and_drawn() -> None:
    names = set(errors.__all__) - {"WriteFailure"}
    assert names == {*BUILTIN, "UserfaultError"}
    assert errors.__doc__ is not None
    for name in names:
        assert name in errors.__doc__


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_error_is_also_the_builtin_that_fits(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, errors.UserfaultError)
    for base in BUILTIN[name]:
        assert issubclass(cls, base)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_error_survives_pickling(name: str) -> None:
    error = getattr(errors, name)("what happened, and what to do")
    error.add_note("a note")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error) == "what happened, and what to do"
    assert back.__dict__ == error.__dict__


def test_source_error_keeps_its_attributes() -> None:
    error = errors.SourceError("no", source_name="t2m", offset=8, length=5, detail="HTTP 503", errno=5)
    back = pickle.loads(pickle.dumps(error))
    assert (back.source_name, back.offset, back.length) == ("t2m", 8, 5)
    assert (back.detail, back.errno) == ("HTTP 503", 5)
    assert str(back) == "no"


def test_flush_error_keeps_what_failed() -> None:
    failures = (
        errors.WriteFailure(4096, 4096, "OSError: disk full", 28),
        errors.WriteFailure(65536, 100, "OSError: disk full", 28),
    )
    error = errors.FlushError("no", source_name="t2m", failures=failures)
    back = pickle.loads(pickle.dumps(error))
    assert back.failures == failures
    assert (back.source_name, back.offset, back.length) == ("t2m", 4096, 4096)
    assert (back.detail, back.errno, str(back)) == ("OSError: disk full", 28, "no")
    commit = errors.FlushError("no", detail="conflict", errno=5)
    assert (commit.failures, commit.offset, commit.detail, commit.errno) == ((), None, "conflict", 5)


def test_kernel_errors_keep_their_attributes() -> None:
    kernel = pickle.loads(pickle.dumps(errors.KernelError("no", call="UFFDIO_API", address=4096, errno=22)))
    assert (kernel.call, kernel.address, kernel.errno) == ("UFFDIO_API", 4096, 22)
    privilege = pickle.loads(pickle.dumps(errors.PrivilegeError("no", call="userfaultfd", errno=1)))
    assert (privilege.call, privilege.errno) == ("userfaultfd", 1)


def test_missing_extra_names_the_exact_command() -> None:
    error = errors.MissingExtraError.for_module("h5py", "hdf5", "reading HDF5 datasets")
    assert str(error) == "reading HDF5 datasets needs h5py: pip install 'userfault[hdf5]'"
    back = pickle.loads(pickle.dumps(error))
    assert (back.name, back.extra, str(back)) == ("h5py", "hdf5", str(error))
