"""How the compilers of AMD's and Intel's GPUs load where there is no driver.

Their plugins name libraries of the driver, which compiling calls nowhere. `register`
makes each from the names that the plugin wants of it, with every function an error,
loads them, and tells JAX of the plugin, whose own way to do so first asks for a device.
It takes gcc and readelf, and a second.
"""

from collections.abc import Iterable
import ctypes
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile

# For each platform: the modules that hold the plugin, the name of its file, and which
# libraries are of the driver.
_PLUGINS = {
  "rocm": (("jax_plugins.xla_rocm7",), "xla_rocm_plugin.so", re.compile(".")),
  "oneapi": (
    ("jax_plugins.xla_oneapi", "jax_plugins.oneapi"),
    "pjrt_plugin_oneapi.so",
    re.compile("^libze_"),
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
  plugin = _plugin(platform)
  load(plugin, _PLUGINS[platform][2])
  options = xla_client.generate_pjrt_gpu_plugin_options()
  options["platform_name"] = platform.upper()
  # Else JAX calls the plugins' own ways.
  xla_bridge.discover_pjrt_plugins = lambda: None
  xla_bridge.register_plugin(
    platform, priority=500, library_path=str(plugin), options=options
  )


def _plugin(platform: str) -> pathlib.Path:
  modules, file, _ = _PLUGINS[platform]
  for module in modules:
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
      if (found := pathlib.Path(folder) / file).exists():
        return found
  raise RuntimeError(f"{file} is in none of {', '.join(modules)}.")


def load(plugin: pathlib.Path, driver: re.Pattern[str]) -> list[str]:
  """Loads a library for each of the driver's that a plugin names; returns their names.

  The linker takes a loaded library for one of the same name, so that no path has to be
  set before the process starts.
  """
  needed = [
    name
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", _elf("-d", plugin))
    if driver.search(name) and not _SYSTEM.match(name)
  ]
  wanted = _wanted(plugin, needed)
  with tempfile.TemporaryDirectory() as folder:
    for name in needed:
      ctypes.CDLL(str(_made(pathlib.Path(folder), name, wanted[name])))
  return needed


def _wanted(
  plugin: pathlib.Path, libraries: Iterable[str]
) -> dict[str, dict[str, list[str]]]:
  """Sorts what a plugin does not define by library and by version ("": none)."""
  found: dict[str, dict[str, list[str]]] = {name: {} for name in libraries}
  # Which library has a version: "Version needs" names them, file by file.
  homes: dict[str, str] = {}
  file = ""
  for line in _elf("-V", plugin).partition("Version needs")[2].splitlines():
    if match := re.search(r"File: (\S+)", line):
      file = match[1]
    elif match := re.search(r"Name: (\S+)", line):
      homes[match[1]] = file
  # Names without a version may be in any of them.
  some = next((name for name in found if name not in homes.values()), None)
  for line in _elf("--dyn-syms", plugin).splitlines():
    match = re.search(r"(?:FUNC|NOTYPE)\s+GLOBAL\s+\S+\s+UND ([^\s@]+)@*(\S*)", line)
    if match:
      home = homes.get(match[2], "") if match[2] else some
      if home in found:
        found[home].setdefault(match[2], []).append(match[1])
  return found


def _made(
  folder: pathlib.Path, library: str, versions: dict[str, list[str]]
) -> pathlib.Path:
  """Compiles a library of functions that fail."""
  source, script, target = (folder / x for x in ("stub.c", "stub.map", library))
  names = sorted({name for group in versions.values() for name in group})
  source.write_text("static char some[1 << 16];\n" + "".join(map(_function, names)))
  tags = [
    f"{version} {{ global: {' '.join(f'{name};' for name in group)} }};\n"
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
