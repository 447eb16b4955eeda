# 3.15 by default: it can import lazily, which saves memory and start-up. `--build-arg PYTHON=3.14` is tested as well.
ARG PYTHON=3.15

# The official image has the interpreter and, below it, the Debian whose libraries the last stage takes what it needs of.
FROM python:${PYTHON}-slim AS build

# Any failing command fails the build, inside a pipe as well.
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# `strip` takes debugging symbols out of wheels. A Debian library that a package of yours links is installed here, too,
# and comes along into the image by itself.
# hadolint ignore=DL3008,DL3009
RUN apt-get update && apt-get install --yes --no-install-recommends binutils

# The lock decides what is installed, by hash. It is mounted, not copied; the cache makes the next build quick. What opens
# a private index, and who signs for it, are secrets of the build: no layer holds them.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=requirements.txt,target=/requirements.txt \
    --mount=type=secret,id=NETRC,target=/root/.netrc --mount=type=secret,id=PIP_CONF,target=/etc/pip.conf \
    --mount=type=secret,id=CA_CERT \
    SSL_CERT_FILE=/run/secrets/CA_CERT pip install --no-compile --require-hashes --requirement /requirements.txt

# FastAPI's own stack and the standard library import each other lazily. Everything else is imported at once, whoever
# asks for it, and so is all that your code and your packages import: what is missing is missed where it is imported.
# The first search for garbage waits for 100,000 objects, as what is imported is none; later ones are as frequent as
# ever, or as the service has set. On 3.14 that would cost 2.5 MB.
COPY <<EOF /tmp/sitecustomize.py
import gc
import sys

LAZY = {"anyio", "click", "fastapi", "fastapi_offline", "pydantic", "starlette", "uvicorn"} | sys.stdlib_module_names


def lazy(importer, imported, names):
    """Whether both are of the named; code that runs without a name has no importer."""
    return importer is not None and {importer.split(".")[0], imported.split(".")[0]} <= LAZY


if sys.version_info >= (3, 15):
    sys.set_lazy_imports_filter(lazy)
    sys.set_lazy_imports("all")
    usual = gc.get_threshold()
    gc.callbacks.append(lambda *_: gc.get_threshold()[0] == 100_000 and gc.set_threshold(*usual))
    gc.set_threshold(100_000)
EOF

# Git for Windows may have ended these lines with CR and LF, which bash would take for parts of its words.
RUN ! grep --quiet $'\r' /tmp/sitecustomize.py || { echo "The Dockerfile has CRLF line ends: with \
\`* text=auto eol=lf\` in .gitattributes, \`git rm --cached -r . && git reset --hard\` brings LF." >&2; exit 1; }

# Leave out what needs a display, a terminal, an IDE or pip, tests of the interpreter, twins in Python of modules in C, and
# of the profiler, which came with 3.15, its screen, its heat map and its large logo. Of the packages only those of our own
# lock are touched, by name: symbols of extensions and what a compiler, a type checker or an assistant reads go; certifi's
# list of authorities is the system's; and Redoc shows an empty picture for its maker's logo, which is on another host: the
# page's policy blocks that, as an error. A name that is not there any more fails the build.
# hadolint ignore=DL3003,SC2164
RUN <<EOF
cd /usr/local/lib/python3.??
rm -r config-* curses ensurepip idlelib pydoc_data tkinter turtle* venv _pydatetime.py _pydecimal.py _pyio.py
rm -r lib-dynload/{*_test*,*xx*,_curses*,_tkinter*} site-packages/{pip,pip-*} /usr/local/bin/{{idle,pip,pydoc}{,3,3.??},python*-config}
if [ -d profiling ]; then
    rm -r profiling/sampling/{live_collector,_heatmap_assets}
    mv profiling/sampling/_assets/{python-logo-only,tachyon-logo}.png
fi
cd site-packages
mv /tmp/sitecustomize.py .
strip --strip-unneeded ../lib-dynload/*.so httptools/parser/*.so pydantic_core/*.so uvloop/*.so
rm -r fastapi/.agents pydantic/{,v1/}mypy.py httptools/parser/*.p[xy]? pydantic_core/*/*.pyi \
    uvloop/{,handles/,includes/}*.p[xy][dix]
ln -sf /etc/ssl/certs/ca-certificates.crt certifi/cacert.pem
logo=https://cdn.redoc.ly/redoc/logo-mini.svg redoc=fastapi_offline/static/redoc.standalone.js
grep --quiet $logo $redoc || { echo "$redoc does not load $logo any more: the next line can go." >&2; exit 1; }
sed -i "s,$logo,data:image/gif;base64\,R0lGODlhAQABAAAAADs=," $redoc
EOF

# FastAPI asks of each model whether it is one of pydantic.v1, and imports that to ask, 1.6 MB: none is as long as nobody
# else has imported it.
# hadolint ignore=DL3003,SC2164
RUN <<EOF
cd /usr/local/lib/python3.??/site-packages/fastapi/_compat
sed -i 's/^import types$/import sys\n&/; s/from pydantic import v1$/v1 = sys.modules["pydantic.v1"]/
    /sys.modules/,/return False/s/except ImportError/except KeyError/' shared.py
[ "$(grep -c -e '^import sys$' -e 'sys.modules\["pydantic.v1"\]$' -e 'except KeyError' shared.py)" = 5 ] || {
    echo "FastAPI asks for pydantic.v1 in another way now: this step can go, or be adapted." >&2; exit 1; }
EOF

# No start compiles. Sources stay for tracebacks; unchecked, since files do not change, and always to the same bytes. A
# file of a package that is no Python of this version fails where it is imported, not here.
RUN <<EOF
export PYTHONHASHSEED=0
compile=(python -X no_debug_ranges -m compileall -qf --invalidation-mode unchecked-hash)
"${compile[@]}" -x site-packages /usr/local/lib/python3.??
"${compile[@]}" /usr/local/lib/python3.??/site-packages || echo "What is no Python of this version stays as it is." >&2
EOF

# The root of the image: Python and the programs of packages; the Debian libraries that `ldd` names for these and for
# each extension; what the C library reads about users, names, time zones and certificates; and which Debian packages
# all this is from, for scanners to find. What a package has put elsewhere below /usr/local, such as in share, comes along. A
# new volume at /data belongs to the image's user, as this folder does.
RUN <<EOF
python=$(echo /usr/local/lib/python3.??)
mapfile -t elsewhere < <(sed -n 's|^"\?\(\.\./\.\./[^,"]*\).*|'"$python"'/site-packages/\1|p' \
    "$python"/site-packages/*.dist-info/RECORD | xargs -r realpath | grep -v '^/usr/local/bin/')
mkdir -p /image/etc /image/var/lib/dpkg/status.d
install -d -m 1777 /image/tmp
install -d -o 65532 -g 65532 /image/data
cp -a --parents /usr/local/bin/* "$python" "${elsewhere[@]}" /image

find /usr/local/bin "$python" "${elsewhere[@]}" -type f \( -name '*.so*' -o -perm -1 \) | while read -r file; do
    IFS= LC_ALL=C read -rN4 magic < "$file" && [ "$magic" = $'\x7fELF' ] || continue
    ldd "$file" 2>&1 || echo "$file is for another kind of machine, or needs no library." >&2
done > /ldd
sed -n 's/^\s*\(\S*\) => not found$/\1/p; /version .* not found/p' /ldd | sort -u | while read -r library; do
    [ -n "$(find "$python" "${elsewhere[@]}" -name "$library")" ] || { echo "A package needs $library, which is not here: \
install the Debian package that has it, where binutils is installed." >&2; exit 1; }
done

printf '%s\n' /etc/ld.so.conf /etc/ld.so.conf.d /etc/os-release /etc/protocols /etc/services /sbin/ldconfig \
    /usr/share/zoneinfo > /files
sed -n 's/.*\s\(\/.*\) (0x.*/\1/p' /ldd | grep -v -e "^$python/" -e '^/usr/local/lib/libpython3' |
    grep -vxFf <(printf '%s\n' "${elsewhere[@]}") >> /files
xargs realpath < /files | xargs dpkg --search | cut -d: -f1 > /packages
for package in $(sort -u /packages) ca-certificates; do
    dpkg --status "$package" > "/image/var/lib/dpkg/status.d/$package"
done
sed -n 's/.*\s\(\/usr\/local\/lib\/libpython3.*\) (0x.*/\1/p' /ldd >> /files
printf '%s\n' /etc/nsswitch.conf /etc/ssl/certs/ca-certificates.crt >> /files
sort -u /files | xargs cp -RH --parents --target-directory=/image
rm /image/usr/share/zoneinfo/{*.tab,leap*,tzdata.zi}
printf 'root:x:0:0::/nonexistent:\nnonroot:x:65532:65532::/tmp:\n' > /image/etc/passwd
printf 'root:x:0:\nnonroot:x:65532:\n' > /image/etc/group
ldconfig -r /image
EOF

# For `make shell`: the same packages and main.py, with a shell and Debian's tools around them. The image takes main.py from
# here.
FROM build AS shell
WORKDIR /app
COPY --chmod=644 main.py .
ENTRYPOINT ["bash"]

# A start that compiles nothing takes 2.7 MB and 5 ms less, for 0.3 s of a build. Checked by its hash, since another one may
# be mounted over it.
RUN PYTHONHASHSEED=0 python -m compileall -q --invalidation-mode checked-hash main.py

# The image itself.
FROM scratch

# What it is; `make build` adds version, revision, source, date and base.
LABEL org.opencontainers.image.title="fastapi-container" \
      org.opencontainers.image.description="A FastAPI service in one file" \
      org.opencontainers.image.licenses="MIT-0"

# Python and what it needs, owned by root and written by nobody.
COPY --from=build /image /

# Where Python and the certificates are, and the only place that any user may write to; no plugins of pydantic, for which
# each start would search all packages; and, unlike on a host, all addresses and the port of HTTP.
ENV PATH=/usr/local/bin HOME=/tmp SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PYDANTIC_DISABLE_PLUGINS=true \
    UVICORN_HOST=0.0.0.0 PORT=80

# It asks the way that PID 1 serves: an option wins over UVICORN_<OPTION>, and that over PORT. HANG_SECONDS makes it wait
# so long and then kill what accepts a connection and says nothing, which it can where PID 1 is an init.
COPY --chmod=644 <<'EOF' /usr/local/bin/healthcheck.py
"""Ask the service for /livez the way that it serves."""
import os
import signal
import socket
import sys

with open("/proc/1/cmdline") as file:
    arguments = file.read().split("\0")


def option(name):
    """What uvicorn's option of this name is told on the command line, or else by its variable."""
    told = os.environ.get("UVICORN_" + name.upper().replace("-", "_"), "")
    for argument, following in zip(arguments, arguments[1:]):
        flag, equals, value = argument.partition("=")
        if flag == "--" + name:
            told = value if equals else following
    return told


def port():
    """The port that main.py listens on."""
    secret = os.environ.get("PORT_FILE")
    if secret and not option("port"):
        with open(secret) as file:
            return int(file.read())
    return int(option("port") or os.environ.get("PORT") or 8000)


def connect(seconds):
    """A connection to the socket, or to the address and the port."""
    if path := option("uds"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(seconds)
        connection.connect(path)
        return connection
    host = option("host")
    return socket.create_connection(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host).encode(), port()), seconds)


def lives(connection):
    """Whether /livez is answered with 200; where clients need a certificate, which this has not, whether TLS is."""
    if option("ssl-certfile") or option("ssl-keyfile"):
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = context.wrap_socket(connection)
        if option("ssl-cert-reqs") == "2":
            return True
    connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
    return b" 200 " in connection.recv(64)


hang = float(os.environ.get("HANG_SECONDS") or 0)
connection = connect(hang or 2)
try:
    sys.exit(None if lives(connection) else "/livez is not answered with 200")
except TimeoutError:
    if hang:
        os.kill(-1, signal.SIGKILL)
    raise
EOF

# Before USER, since it belongs to whoever makes it.
WORKDIR /app

# For people and tools to read; Docker lets any user listen on it.
EXPOSE 80

# A number, so that Kubernetes can tell that it is not root.
USER 65532:65532

# In Python, since there is no curl; without site-packages, since it runs every ten seconds.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=0.25s \
    CMD ["python", "-IS", "/usr/local/bin/healthcheck.py"]

# Each package is imported once in the image as it is, by its user: one that lacks something ends the build. A module that
# is listed and not there, or wants a package that is not installed, is its maker's business.
SHELL ["python", "-c"]
# hadolint ignore=SC2239
RUN --mount=type=tmpfs,target=/tmp <<EOF
import importlib.metadata
import sys

ours = importlib.metadata.packages_distributions()
for module, packages in ours.items():
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module and error.name.partition(".")[0] in {*ours, *sys.stdlib_module_names}:
            sys.exit(f"{packages[0]} cannot be imported in this image: {error}")
    except (Exception, SystemExit) as error:
        sys.exit(f"{packages[0]} cannot be imported in this image: {error!r}")
EOF

# PID 1 is Python, and what follows the image's name in `docker run` are its arguments. As a module, main.py starts from
# what was compiled.
ENTRYPOINT ["python", "-m", "main"]

# Last, and the only file of yours, beside its compiled form: of the image, an edit of it changes this layer alone.
COPY --from=shell /app .
