"""How the compilers of AMD's and Intel's GPUs load where there is no driver.

Their plugins name libraries of the driver, which compiling calls nowhere. `register`
makes each from the names that the plugin wants of it, with every function an error,
loads them, and tells JAX of the plugin, whose own way to do so first asks for a device.
It takes gcc and readelf, and a second.
"""

import ctypes
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple


class _Plugin(NamedTuple):
  """Describes the plugin of a platform.

  Attributes:
    module: the module in whose folder it is.
    file: the name of its file.
    name: the platform, as XLA calls it.
    libraries: which libraries are of the driver, by their names.
    functions: which functions these have.
  """

  module: str
  file: str
  name: str
  libraries: re.Pattern[str]
  functions: re.Pattern[str]


_PLUGINS = {
  "rocm": _Plugin(
    "jax_plugins.xla_rocm7",
    "xla_rocm_plugin.so",
    "ROCM",
    re.compile(".*"),
    re.compile(".*"),
  ),
  # Its other libraries come with the package, and some of them want the driver, too.
  "oneapi": _Plugin(
    "jax_plugins.xla_oneapi",
    "xla_oneapi_plugin.so",
    "SYCL",
    re.compile("libze_.*"),
    re.compile("(ze|zes|zet|zel)[A-Z].*"),
  ),
}
# Of the C library and the compiler, which every machine has.
_SYSTEM = re.compile(r"^(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|z)\.so|ld-linux)")
# Functions that return text, or a handle that is used at once, and what they return.
_TEXT = re.compile("(ErrorString|ErrorName|status_string|status_to_string)$")
_HANDLE = re.compile("^__hipRegisterFatBinary$")


def register(platform: str) -> None:
  """Tells JAX of a plugin, `rocm` or `oneapi`, on a machine without its driver.

  Raises:
    RuntimeError: if gcc or readelf is missing.
  """
  from jax._src import xla_bridge
  from jax._src.lib import xla_client

  if platform in xla_bridge._backend_factories:
    return
  plugin = _PLUGINS[platform]
  path = _path(plugin)
  _load(path, plugin)
  options = xla_client.generate_pjrt_gpu_plugin_options()
  options["platform_name"] = plugin.name
  # Else JAX calls the plugins' own ways.
  xla_bridge.discover_pjrt_plugins = lambda: None
  xla_bridge.register_plugin(
    platform, priority=500, library_path=str(path), options=options
  )


def _path(plugin: _Plugin) -> pathlib.Path:
  spec = importlib.util.find_spec(plugin.module)
  for folder in (spec and spec.submodule_search_locations) or ():
    if (found := pathlib.Path(folder) / plugin.file).exists():
      return found
  raise RuntimeError(f"{plugin.module} has no {plugin.file}.")


def _load(path: pathlib.Path, plugin: _Plugin) -> None:
  """Loads a library for each of the driver's that a plugin names.

  The linker takes a loaded library for one of the same name, so that no path has to be
  set before the process starts.
  """
  needed = [
    name
    for name in _needed(path)
    if plugin.libraries.fullmatch(name) and not _SYSTEM.match(name)
  ]
  # Of the package's own libraries, which it puts beside Python's.
  beside = [path.parents[4] / name for name in _needed(path)]
  users = [path, *(x for x in beside if x.exists())]
  wanted: dict[str, dict[str, set[str]]] = {name: {} for name in needed}
  for user in users:
    _collect(user, plugin, wanted)
  with tempfile.TemporaryDirectory() as folder:
    for name in needed:
      ctypes.CDLL(str(_made(pathlib.Path(folder), name, wanted[name])))


def _needed(path: pathlib.Path) -> list[str]:
  return re.findall(r"\(NEEDED\).*\[(.*)\]", _elf("-d", path))


def _collect(
  user: pathlib.Path, plugin: _Plugin, wanted: dict[str, dict[str, set[str]]]
) -> None:
  """Adds what a file wants, by library and by version ("": none)."""
  # Which library has a version: "Version needs" names them, file by file.
  homes: dict[str, str] = {}
  file = ""
  for line in _elf("-V", user).partition("Version needs")[2].splitlines():
    if match := re.search(r"File: (\S+)", line):
      file = match[1]
    elif match := re.search(r"Name: (\S+)", line):
      homes[match[1]] = file
  # Names without a version may be in any of the others.
  some = next((name for name in wanted if name not in homes.values()), "")
  for line in _elf("--dyn-syms", user).splitlines():
    match = re.search(r"(?:FUNC|NOTYPE)\s+GLOBAL\s+\S+\s+UND ([^\s@]+)@*(\S*)", line)
    if match and plugin.functions.fullmatch(match[1]):
      home = homes.get(match[2], "") if match[2] else some
      if home in wanted:
        wanted[home].setdefault(match[2], set()).add(match[1])


def _made(
  folder: pathlib.Path, library: str, versions: dict[str, set[str]]
) -> pathlib.Path:
  """Compiles a library of functions that fail."""
  source, script, target = (folder / x for x in ("stub.c", "stub.map", library))
  names = sorted({name for group in versions.values() for name in group})
  source.write_text("static char some[1 << 16];\n" + "".join(map(_function, names)))
  tags = [
    f"{version} {{ global: {' '.join(f'{name};' for name in sorted(group))} }};\n"
    for version, group in versions.items()
    if version
  ]
  script.write_text("".join(tags))
  command = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
  if tags:
    command.append(f"-Wl,--version-script={script}")
  _run("gcc", *command, "-o", str(target), str(source))
  return target


def _function(name: str) -> str:
  if _TEXT.search(name):
    return f'const char *{name}(void) {{ return "stub"; }}\n'
  if _HANDLE.search(name):
    return f"void *{name}(void) {{ return some; }}\n"
  # Of HIP: there is no device.
  return f"long {name}(void) {{ return 100; }}\n"


def _elf(what: str, file: pathlib.Path) -> str:
  return _run("readelf", "-W", what, str(file))


def _run(program: str, *arguments: str) -> str:
  if shutil.which(program) is None:
    raise RuntimeError(
      f"{program} is missing, which makes stand-ins for libraries of a GPU's driver:"
      " apt-get install gcc binutils."
    )
  return subprocess.run(
    [program, *arguments], check=True, capture_output=True, text=True
  ).stdout
