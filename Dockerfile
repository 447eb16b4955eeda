# 3.15 by default: it can import lazily, which saves memory and start-up. `--build-arg PYTHON=3.14` is tested as well.
ARG PYTHON=3.15

# The official image has the interpreter and, below it, the Debian whose libraries the last stage takes what it needs of.
FROM python:${PYTHON}-slim AS build

# Any failing command fails the build, inside a pipe as well, and all of them are shown.
SHELL ["/bin/bash", "-euxo", "pipefail", "-c"]

# `strip` takes debugging symbols out of wheels. A Debian library that a package of yours links is installed here, too,
# and comes along into the image by itself.
# hadolint ignore=DL3008,DL3009
RUN apt-get update && apt-get install --yes --no-install-recommends binutils

# The lock decides what is installed, by hash. It is mounted, not copied; the cache makes the next build quick.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=requirements.txt,target=/requirements.txt \
    pip install --no-compile --require-hashes --requirement /requirements.txt

# FastAPI's own stack and the standard library import lazily, everything else (main.py, your packages) as written:
# so an import that fails does so before the service is ready. OpenTelemetry, too, is of the rest: its modules for
# protobuf import others for what these register. The first search for garbage waits for 100,000 objects, as what is
# imported is none; later ones are as frequent as ever, or as the service has set. On 3.14 that would cost 2.5 MB.
COPY <<EOF /tmp/sitecustomize.py
import gc
import sys

LAZY = {"anyio", "click", "fastapi", "fastapi_offline", "pydantic", "starlette", "uvicorn"} | sys.stdlib_module_names
if sys.version_info >= (3, 15):
    sys.set_lazy_imports_filter(lambda importer, *_: importer.split(".")[0] in LAZY)
    sys.set_lazy_imports("all")
    usual = gc.get_threshold()
    gc.callbacks.append(lambda *_: gc.get_threshold()[0] == 100_000 and gc.set_threshold(*usual))
    gc.set_threshold(100_000)
EOF

# Leave out what needs a display, an IDE, pip or a type checker, the pages that a profiler makes, notes for assistants,
# tests of the interpreter, twins in Python of modules in C, and sources that were compiled into extensions. Let there
# be one list of certificate authorities, the system's. Let Redoc show an empty picture for its maker's logo, which is on
# another host: the page's policy blocks that, as an error.
# Compile the rest, sources staying for tracebacks: unchecked, since files do not change, and always to the same bytes.
RUN <<EOF
mv /tmp/sitecustomize.py /usr/local/lib/python3.??/site-packages
rm -rf /usr/local/lib/python3.??/{config-*,ensurepip,idlelib,pydoc_data,tkinter,turtle*,venv}
rm -rf /usr/local/lib/python3.??/{lib-dynload/{*_test*,*xx*,_tkinter*},_pydatetime.py,_pydecimal.py,_pyio.py}
rm -rf /usr/local/lib/python3.??/profiling/sampling/{_vendor,*_assets}
rm -rf /usr/local/lib/python3.??/site-packages/{pip,pip-*,fastapi/.agents,pydantic/{,v1/}mypy.py}
find /usr/local/lib/python3.??/site-packages -regex '.*\.\(c\|h\|pxd\|pyi\|pyx\)' -delete
find /usr/local/lib/python3.??/site-packages -name cacert.pem -exec ln -sf /etc/ssl/certs/ca-certificates.crt {} \;
sed -i 's,https://cdn.redoc.ly/redoc/logo-mini.svg,data:image/gif;base64\,R0lGODlhAQABAAAAADs=,' \
    /usr/local/lib/python3.??/site-packages/fastapi_offline/static/redoc.standalone.js
find /usr/local/lib/python3.?? -type f -name '*.so*' -exec strip --strip-unneeded {} +
PYTHONHASHSEED=0 python -X no_debug_ranges -m compileall -qf --invalidation-mode unchecked-hash /usr/local/lib/python3.??
EOF

# The root of the image: Python; the libraries that `ldd` names for it and for each extension; what the C library reads
# about users, names, time zones and certificates; and which Debian packages these are from, for scanners to find.
RUN <<EOF
mkdir -p /image/etc /image/var/lib/dpkg/status.d && mkdir -m 1777 /image/tmp
cp -a --parents /usr/local/bin/python /usr/local/bin/python3 /usr/local/bin/python3.?? /usr/local/lib/python3.?? /image
printf '%s\n' /etc/ld.so.conf /etc/ld.so.conf.d /etc/nsswitch.conf /etc/os-release /etc/protocols /etc/services \
    /etc/ssl/certs/ca-certificates.crt /sbin/ldconfig /usr/share/zoneinfo > /files
find /image/usr/local -type f -name '*.so*' -exec ldd /usr/local/bin/python3 {} + | sed -n 's/.*\s\(\/.*\) (0x.*/\1/p' >> /files
sort -u /files | xargs cp -RH --parents --target-directory=/image
rm /image/usr/share/zoneinfo/{*.tab,leap*,tzdata.zi}
xargs realpath < /files | { xargs dpkg --search || true; } | cut -d: -f1 > /packages
for package in $(sort -u /packages) ca-certificates; do
    dpkg --status "$package" > "/image/var/lib/dpkg/status.d/$package"
done
printf 'root:x:0:0::/nonexistent:\nnonroot:x:65532:65532::/nonexistent:\n' > /image/etc/passwd
printf 'root:x:0:\nnonroot:x:65532:\n' > /image/etc/group
ldconfig -r /image
EOF

# For `make shell`: the same packages and main.py, with a shell and Debian's tools around them.
FROM build AS shell
WORKDIR /app
COPY --chmod=644 main.py .
ENTRYPOINT ["bash"]

# The image itself.
FROM scratch

# What it is; `make build` adds version, revision, source, date and base.
LABEL org.opencontainers.image.title="fastapi-container" \
      org.opencontainers.image.description="A FastAPI service in one file" \
      org.opencontainers.image.licenses="MIT-0"

# Python and what it needs, owned by root and written by nobody.
COPY --from=build /image /

# Where Python and the certificates are; no plugins of pydantic, for which each start would search all packages; and,
# unlike on a host, all addresses and the port of HTTP.
ENV PATH=/usr/local/bin SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PYDANTIC_DISABLE_PLUGINS=true \
    UVICORN_HOST=0.0.0.0 PORT=80

# Before USER, since it belongs to whoever makes it.
WORKDIR /app

# For people and tools to read; Docker lets any user listen on it.
EXPOSE 80

# A number, so that Kubernetes can tell that it is not root.
USER 65532:65532

# In Python, since there is no curl; without site-packages, since it runs every ten seconds.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=0.25s \
    CMD ["python", "-ISc", "import os, socket; s = socket.create_connection((b'localhost', int(os.environ['PORT'] or 8000)), 2); s.sendall(b'GET /livez HTTP/1.0\\r\\n\\r\\n'); assert b' 200 ' in s.recv(64)"]

# PID 1 is Python, and what follows the image's name in `docker run` are its arguments.
ENTRYPOINT ["python", "main.py"]

# Last, and the only file of yours: an edit of it rebuilds this layer alone.
COPY --chmod=644 main.py .
