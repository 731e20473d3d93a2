# All that the service stands on. A change of its source leaves this stage, the slow and large one, as it is.
FROM python:3.11-slim AS dependencies
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv
# PyPI's torch for Linux brings gigabytes of CUDA along; PyTorch's own index has one for the CPU alone, which ranks
# above it for its "+cpu". Another index makes an image for a GPU; an empty one (--build-arg TORCH_INDEX=) leaves the
# choice to pip's usual indexes, and so, after a few warnings, does one that cannot be reached.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.lock ./
RUN pip --python /opt/venv/bin/python install --no-deps --constraint requirements.lock \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
# The rest, as pyproject.toml has it, buckets among it; without headers and tests, which serve nobody here. torch/bin is tests too,
# but for the shared memory manager that torch asks for when it is imported.
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
      print(*p['dependencies'], *p['optional-dependencies']['s3'], sep='\n')" > dependencies.txt \
 && pip --python /opt/venv/bin/python install --constraint requirements.lock --requirement dependencies.txt \
 && rm -rf /opt/venv/lib/python*/site-packages/torch/include /opt/venv/lib/python*/site-packages/torch/test \
    /opt/venv/lib/python*/site-packages/pyarrow/include \
 && find /opt/venv/lib/python*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete \
 && find /opt/venv/lib -type d -name tests -prune -exec rm -rf {} +

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY model model
COPY service service
RUN pip --python /opt/venv/bin/python wheel --no-deps --no-build-isolation --wheel-dir /wheel .

FROM python:3.11-slim
RUN groupadd --gid 10001 miss-iwem \
 && useradd --uid 10001 --gid 10001 --no-create-home --no-log-init --shell /usr/sbin/nologin miss-iwem \
 && install --directory --owner=10001 --group=10001 /batches
COPY --from=dependencies /opt/venv /opt/venv
COPY checkpoints /checkpoints
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-deps /wheel/*.whl
# Waiting threads sleep, for spinning ones slow each other down where processors are shared.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=PASSIVE \
    MISS_IWEM_CHECKPOINTS=/checkpoints \
    MISS_IWEM_BATCHES=/batches \
    MISS_IWEM_HTTP_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["miss-iwem", "serve"]
