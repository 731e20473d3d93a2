# What the service depends on; a change of the source leaves this stage, the slow and large one, as it is.
FROM python:3.11-slim AS dependencies
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv
COPY requirements.lock pyproject.toml ./
# PyPI's torch for Linux brings 4 GB of CUDA with it; PyTorch's own index has one for the CPU. It ranks above
# PyPI's as 2.13.0+cpu. Empty (--build-arg TORCH_INDEX=) takes what pip's usual indexes have, as pip does when the
# index cannot be reached; https://download.pytorch.org/whl/cu130 makes an image for a GPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/venv/bin/python install --no-deps --constraint requirements.lock \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
# The rest, read from pyproject.toml. Headers and tests are of no use in a service; torch looks for its shm manager.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > dependencies.txt \
 && pip --python /opt/venv/bin/python install --constraint requirements.lock --requirement dependencies.txt \
 && cd /opt/venv/lib/python3.11/site-packages \
 && rm -rf torch/include torch/test \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find sympy networkx numpy -type d -name tests -prune -exec rm -rf {} +

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY model model
COPY service service
RUN pip --python /opt/venv/bin/python wheel --no-deps --no-build-isolation --wheel-dir /wheel .

FROM python:3.11-slim
RUN groupadd --gid 10001 miss-iwem \
 && useradd --uid 10001 --gid 10001 --no-create-home --no-log-init --shell /usr/sbin/nologin miss-iwem
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
    MISS_IWEM_HTTP_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["miss-iwem", "serve"]
