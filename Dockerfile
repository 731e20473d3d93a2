# syntax=docker/dockerfile:1
FROM python:3.11-slim AS build
WORKDIR /app
RUN python -m venv /opt/venv
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY model model
COPY service service
# The CPU build of PyTorch is enough to serve; name another index for a CUDA one.
ARG TORCH_INDEX=""
RUN /opt/venv/bin/pip install --no-cache-dir --constraint requirements.lock \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home miss-iwem
COPY --from=build /opt/venv /opt/venv
COPY checkpoints /checkpoints
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    MISS_IWEM_CHECKPOINTS=/checkpoints \
    MISS_IWEM_HTTP_HOST=0.0.0.0
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["miss-iwem", "serve"]
