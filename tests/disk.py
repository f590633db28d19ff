"""What a file system may hold after the power went, worked out from what a process asked of it.

`record` has strace write down every call by which a process changes files below a folder; `disk_after` builds the
folder as it may be found when the power went between two of these calls. The rules are those that POSIX gives:

- bytes written to a file, and its length, last once the file was synced (fsync) after they were written;
- names made, exchanged or taken away in a folder last once the folder was synced after that: a file that was synced may
  be without its name, and a name may lead to a file whose bytes are not there;
- a rename within a folder is there or not, never in between;
- of all that was not synced, any part may be there: a write may be there, missing, there in some sectors of 512 bytes
  only, or have made the file longer without its bytes (zeros); writes may overtake one another.

Half of the disks have the names of each folder in order (a journal, as ext4 and XFS keep), half in any combination.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

SECTOR = 512
STRACE = shutil.which("strace")
DATA = "write,pwrite64,pwritev,pwritev2,writev,ftruncate,truncate,fallocate,copy_file_range,sendfile"
NAMES = "open,openat,creat,close,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"
TRACED = f"{DATA},{NAMES},link,linkat,symlink,symlinkat,fsync,fdatasync,read,lseek,dup,dup2,dup3,fcntl"
PTRACER, ANY = 0x59616D61, -1  # prctl: any process may trace this one
CALL = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>(.*)|(\w+)\((.*))", re.DOTALL)


@dataclass(kw_only=True)
class Op:
    """A change of a file's bytes (``write``, ``truncate``) or of a folder's names (``name``, ``rename``, ``unname``).

    ``target`` is what has to be synced for it to last: a file, or a folder.
    """

    what: str
    target: int
    ended: int
    offset: int = 0
    data: bytes = b""
    name: str = ""
    other: str = ""
    inode: int = 0


@dataclass(kw_only=True)
class Sync:
    """A file or folder was synced: what was done to it before ``begun`` lasts from ``ended`` on."""

    target: int
    begun: int
    ended: int


@dataclass(kw_only=True)
class Recording:
    """All changes below a folder, in order; moments are numbers of calls."""

    ops: list[Op] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    folders: set[int] = field(default_factory=lambda: {0})
    marks: dict[str, int] = field(default_factory=dict)
    """When the process made and took away a file called ``mark-NAME``, which is no part of the disk."""
    end: int = 0


def record(work: Callable[[], Any], folder: Path, *, timeout_s: float = 120) -> Recording:
    """Do ``work()`` in a child, which may change files below ``folder``, empty before, and by absolute paths.

    Raises:
        RuntimeError: the work did not go well, or did something to files that is not understood here.
    """
    assert STRACE is not None
    assert not list(folder.iterdir())
    go_r, go_w = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            ctypes.CDLL(None).prctl(PTRACER, ANY, 0, 0, 0)
            os.close(go_w)
            os.read(go_r, 1)
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(go_r)
    with tempfile.NamedTemporaryFile("r", prefix="cpmpi-strace-") as log:
        command = [STRACE, "-f", "-xx", "-s", str(1 << 26), "-o", log.name, "-e", f"trace={TRACED}", "-p", str(child)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert tracer.stderr is not None
            attached = tracer.stderr.readline()
            if "attached" not in attached:
                raise PermissionError(f"strace: {attached}")
            os.write(go_w, b"x")
            tracer.wait(timeout_s)
            _, status = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        finally:
            os.close(go_w)
            if tracer.poll() is None:
                tracer.kill()
                tracer.wait()
        if status:
            raise RuntimeError(f"the recorded work ended with {status}")
        return _Reader(folder).read(log)


@dataclass
class _Open:
    """An open file."""

    inode: int
    position: int = 0
    appends: bool = False


class _Reader:
    """Reads what strace wrote, keeping the names and open files as the process had them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, Recording()
        self.paths = {str(folder): 0}
        self.sizes: dict[int, int] = {}
        self.open: dict[int, _Open] = {}
        self.numbers = count(1)

    def read(self, log: Any) -> Recording:
        """Everything."""
        waiting: dict[str, tuple[int, str, str]] = {}
        for moment, line in enumerate(log):
            match = CALL.match(line.rstrip("\n"))
            if match is None:
                continue
            thread, resumed, rest, name, args = match.groups()
            begun = moment
            if resumed is not None:
                begun, name, first = waiting.pop(thread)
                args = first + rest
            if args.endswith("<unfinished ...>"):
                waiting[thread] = (begun, name, args.removesuffix("<unfinished ...>"))
                continue
            inside, _, result = args.rpartition(" = ")
            number = re.match(r"-?\d+", result)
            if number is not None and not number[0].startswith("-"):
                self._call(name, _split(inside.rstrip().removesuffix(")")), int(number[0]), begun, moment)
            self.found.end = moment + 1
        return self.found

    def _call(self, name: str, args: list[str], result: int, begun: int, ended: int) -> None:
        """A call that went well."""
        if name.endswith("at") and args[0].isdecimal() and int(args[0]) in self.open:
            if name == "renameat":
                raise RuntimeError(f"{name}{args} is not understood")
            args = [self._below(self.open[int(args[0])].inode, args[1]), *args[2:]]
        match name:
            case "open" | "openat" | "creat":
                self._open(args, result, ended)
            case "close":
                self.open.pop(int(args[0]), None)
            case "mkdir" | "mkdirat":
                path = _path(args)
                if self._within(path):
                    self.found.folders.add(inode := self._new(path, ended))
                    self.sizes.pop(inode, None)
            case "rename" | "renameat" | "renameat2":
                old, new = (_text(arg) for arg in args if arg.startswith('"'))
                self._rename(old, new, ended)
            case "unlink" | "unlinkat" | "rmdir":
                self._unname(_path(args), ended)
            case "truncate" if self._within(_path(args)):
                self._truncate(self.paths[_path(args)], int(args[1]), ended)
            case "link" | "linkat" | "symlink" | "symlinkat":
                if any(self._within(_text(arg)) for arg in args if arg.startswith('"')):
                    raise RuntimeError(f"{name}{args} is not understood")
            case "fcntl" | "dup" | "dup2" | "dup3":
                if int(args[0]) in self.open and (name != "fcntl" or "F_DUPFD" in args[1]):
                    self.open[result] = self.open[int(args[0])]  # with one position
            case _:
                if args and args[0].isdecimal() and int(args[0]) in self.open:
                    self._data(name, self.open[int(args[0])], args[1:], result, begun, ended)

    def _data(self, name: str, file: _Open, args: list[str], result: int, begun: int, ended: int) -> None:
        """A call on an open file."""
        match name:
            case "read":
                file.position += result
            case "lseek":
                file.position = result
            case "fsync" | "fdatasync":
                self.found.syncs.append(Sync(target=file.inode, begun=begun, ended=ended))
            case "write":
                offset = self.sizes[file.inode] if file.appends else file.position
                self._write(file.inode, offset, _bytes(args[0])[:result], ended)
                file.position = offset + result
            case "pwrite64":
                self._write(file.inode, int(args[2]), _bytes(args[0])[:result], ended)
            case "ftruncate":
                self._truncate(file.inode, int(args[0]), ended)
            case _:
                raise RuntimeError(f"{name} is not understood")

    def _below(self, folder: int, name: str) -> str:
        """An argument with the whole path of what is called so in an open folder."""
        path = next(path for path, inode in self.paths.items() if inode == folder)
        return '"' + f"{path}/{_text(name)}".encode().hex() + '"'

    def _write(self, inode: int, offset: int, data: bytes, ended: int) -> None:
        self.found.ops.append(Op(what="write", target=inode, ended=ended, offset=offset, data=data))
        self.sizes[inode] = max(self.sizes[inode], offset + len(data))

    def _truncate(self, inode: int, size: int, ended: int) -> None:
        self.found.ops.append(Op(what="truncate", target=inode, ended=ended, offset=size))
        self.sizes[inode] = size

    def _open(self, args: list[str], descriptor: int, ended: int) -> None:
        path, flags = _path(args), next((arg for arg in args if "O_" in arg), "O_CREAT|O_TRUNC")
        self.open.pop(descriptor, None)
        if not self._within(path):
            return
        if path not in self.paths:
            assert "O_CREAT" in flags, path
            self._new(path, ended)
        inode = self.paths[path]
        if "O_TRUNC" in flags and self.sizes[inode]:
            self._truncate(inode, 0, ended)
        self.open[descriptor] = _Open(inode, appends="O_APPEND" in flags)

    def _new(self, path: str, ended: int) -> int:
        parent, _, name = path.rpartition("/")
        inode = next(self.numbers)
        self.paths[path], self.sizes[inode] = inode, 0
        if name.startswith("mark-"):
            self.found.marks[name.removeprefix("mark-")] = ended
        else:
            self.found.ops.append(Op(what="name", target=self.paths[parent], ended=ended, name=name, inode=inode))
        return inode

    def _rename(self, old: str, new: str, ended: int) -> None:
        if not (self._within(old) or self._within(new)):
            return
        (parent, _, name), (other_parent, _, other) = old.rpartition("/"), new.rpartition("/")
        inode = self.paths.pop(old)
        assert inode not in self.found.folders, "folders keep their names"
        self.paths[new] = inode
        if parent != other_parent:  # two folders: it may be in both, or in neither
            there = Op(what="name", target=self.paths[other_parent], ended=ended, name=other, inode=inode)
            self.found.ops += [there, Op(what="unname", target=self.paths[parent], ended=ended, name=name)]
            return
        self.found.ops.append(
            Op(what="rename", target=self.paths[parent], ended=ended, name=name, other=other, inode=inode)
        )

    def _unname(self, path: str, ended: int) -> None:
        if not self._within(path):
            return
        parent, _, name = path.rpartition("/")
        self.paths.pop(path)
        if not name.startswith("mark-"):
            self.found.ops.append(Op(what="unname", target=self.paths[parent], ended=ended, name=name))

    def _within(self, path: str) -> bool:
        return path.startswith(f"{self.folder}/") or path == str(self.folder)


def _split(args: str) -> list[str]:
    """Arguments; strings are all in hexadecimal, so that no comma is inside one."""
    return [arg.strip() for arg in args.split(", ")]


def _bytes(arg: str) -> bytes:
    assert arg[0] == arg[-1] == '"', arg[:80]
    return bytes.fromhex(arg[1:-1].replace("\\x", ""))


def _text(arg: str) -> str:
    return os.fsdecode(_bytes(arg))


def _path(args: list[str]) -> str:
    return _text(next(arg for arg in args if arg.startswith('"'))).rstrip("/")


@dataclass(kw_only=True)
class Crash:
    """A disk that was built, in words, for whoever looks at what went wrong."""

    moment: int
    seed: int
    lost: list[str]

    def __str__(self) -> str:
        return f"power lost at call {self.moment} (seed {self.seed}), not there: {'; '.join(self.lost[-6:])}"


def disk_after(recording: Recording, moment: int, seed: int, folder: Path, *, least: bool = False) -> Crash:
    """Build in ``folder``, empty before, what may be found when the power went before call ``moment``; ``least``:
    what was synced, and nothing else."""
    chance = random.Random(seed)
    happened = [op for op in recording.ops if op.ended < moment]
    last: dict[int, int] = defaultdict(lambda: -1)
    for sync in recording.syncs:
        if sync.ended < moment:
            last[sync.target] = max(last[sync.target], sync.begun)
    kept = chance.choice((0.0, 0.5, 0.5, 0.9, 1.0)), chance.choice((0.0, 0.5, 0.5, 0.9, 1.0))  # of data, of names
    kept = (0.0, 0.0) if least else kept
    in_order, cut = chance.random() < 0.5, set()
    files: dict[int, bytearray] = defaultdict(bytearray)
    names: dict[int, dict[str, int]] = defaultdict(dict)
    crash = Crash(moment=moment, seed=seed, lost=[])
    titles = {op.inode: op.name for op in happened if op.inode} | {
        op.inode: op.other for op in happened if op.what == "rename"
    }
    for op in happened:
        lasts = op.ended < last[op.target]
        if op.what in ("write", "truncate"):
            how = "there" if lasts or chance.random() < kept[0] else _loss(chance, least)
            _change(files[op.target], op, how, chance)
            if how != "there":
                crash.lost.append(f"{op.what} of {len(op.data)} at {op.offset} of {titles.get(op.target)} is {how}")
            continue
        there = lasts or (op.target not in cut and chance.random() < kept[1])
        if there:
            _rename(names[op.target], op)
        else:
            crash.lost.append(f"{op.what} of {op.name} {op.other}".rstrip())
            cut |= {op.target} if in_order else set()
    _build(folder, 0, names, files, recording.folders)
    return crash


def _loss(chance: random.Random, least: bool) -> str:
    """How a write that was not synced is found, where it is not there."""
    return "missing" if least else chance.choice(("missing", "zeros", "torn"))


def _rename(names: dict[str, int], op: Op) -> None:
    if op.what != "name":
        names.pop(op.name, None)
    if op.what != "unname":
        names[op.other or op.name] = op.inode


def _change(data: bytearray, op: Op, how: str, chance: random.Random) -> None:
    if op.what == "truncate":
        if how == "there":
            del data[op.offset :]
            data.extend(bytes(op.offset - len(data)))
        return
    if how == "missing":
        return
    stop = op.offset + len(op.data)
    data.extend(bytes(max(0, stop - len(data))))
    if how == "there":
        data[op.offset : stop] = op.data
    if how == "torn":
        bounds = [op.offset, *range((op.offset // SECTOR + 1) * SECTOR, stop, SECTOR), stop]
        for a, b in pairwise(bounds):
            if chance.random() < 0.5:
                data[a:b] = op.data[a - op.offset : b - op.offset]


def _build(
    folder: Path, inode: int, names: dict[int, dict[str, int]], files: dict[int, bytearray], folders: set[int]
) -> None:
    for name, inside in names[inode].items():
        if inside in folders:
            (folder / name).mkdir()
            _build(folder / name, inside, names, files, folders)
        else:
            (folder / name).write_bytes(files[inside])


def moments(recording: Recording, number: int, chance: random.Random) -> Iterator[int]:
    """Moments at which the power goes: half of them anywhere, half beside a rename, a deletion, or a sync."""
    turns = [op.ended for op in recording.ops if op.what != "write"] + [sync.ended for sync in recording.syncs]
    for _ in range(number):
        at = chance.choice(turns) + chance.choice((0, 1)) if chance.random() < 0.5 else chance.randrange(recording.end)
        yield at + 1
