# The Imprint server:  docker build -t imprint .
#
# VARIANT=cuda is what pip's own index gives on Linux x86-64 (run it with --gpus all). The much smaller VARIANT=cpu wants
# one more package index to take torch from, PyTorch's "cpu" index (its installation page names it):
#     docker build --build-arg VARIANT=cpu --build-arg TORCH_INDEX=<that index> -t imprint:cpu .
#
# EXTRAS=archive,ray adds Ray Serve (deploy/ray). PREPARED=no leaves out the default base and the compiled kernels (0.7 GB),
# with which a new container starts in seconds and without a network; kernels are compiled anew on another kind of CPU.

FROM python:3.11-slim AS wheels
ARG VARIANT=cuda
ARG EXTRAS=archive
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY imprint imprint
COPY model model
COPY service service
COPY research research
COPY benchmarks benchmarks
RUN --mount=type=cache,target=/var/cache/pip \
    pip wheel ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --wheel-dir /wheels ".[$EXTRAS]" \
    && if [ "$VARIANT" = cpu ] && [ -n "$(find /wheels -name 'nvidia_*')" ]; then \
        echo "VARIANT=cpu, but pip chose torch's CUDA build: TORCH_INDEX must name an index of CPU builds" >&2; exit 1; \
    fi

FROM python:3.11-slim
ARG VARIANT=cuda
ARG EXTRAS=archive
# Triton compiles what launches our kernels, with a C compiler.
# hadolint ignore=DL3008
RUN if [ "$VARIANT" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/var/cache/imprint NUMBA_CACHE_DIR=/var/cache/imprint/kernels \
    IMPRINT_HOST=0.0.0.0 IMPRINT_PORT=8000 \
    IMPRINT_DATA_DIR=/var/lib/imprint IMPRINT_CACHE_DIR=/var/cache/imprint \
    METRICS_KEY_FILE=/run/imprint/metrics.key
RUN groupadd --gid 10001 imprint \
    && useradd --uid 10001 --gid imprint --no-create-home --home-dir /var/cache/imprint --shell /usr/sbin/nologin imprint \
    && install --directory --owner imprint --group imprint --mode 0700 /var/lib/imprint /var/cache/imprint \
    && install --directory --owner imprint --group imprint /run/imprint
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-index --find-links /wheels "imprint[$EXTRAS]"
ARG PREPARED=yes
RUN if [ "$PREPARED" = yes ]; then \
        export IMPRINT_CACHE_DIR=/usr/local/share/imprint NUMBA_CACHE_DIR=/usr/local/share/imprint/kernels; \
        HOME=/tmp IMPRINT_DEVICE=cpu imprint prepare \
        && chmod -R a+rX /usr/local/share/imprint; \
    fi
COPY --chmod=0755 docker/entrypoint docker/healthcheck.py /usr/local/libexec/imprint/

USER 10001:10001
WORKDIR /var/lib/imprint
VOLUME ["/var/lib/imprint", "/var/cache/imprint"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Without keys of your own (IMPRINT_API_KEYS or IMPRINT_API_KEYS_FILE) the first start makes one and logs it, once, and
# one for /metrics, which it leaves in METRICS_KEY_FILE.
# The first start of another base than the one in the image fetches and converts it, which may take minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "/usr/local/libexec/imprint/healthcheck.py"]
ENTRYPOINT ["/usr/local/libexec/imprint/entrypoint"]
CMD ["serve"]
