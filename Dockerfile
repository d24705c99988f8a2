# Continuous Training in a container. NVIDIA's CUDA libraries come with torch; the host needs its driver and the
# NVIDIA Container Toolkit. compose.yaml starts it with what it needs; docs/services.md says what was tried.
#
#   docker build -t continuous-training .
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 ...   # drivers before 580
FROM python:3.12-slim

# The compiler and Python's headers (which the image has) are for torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements_simple.txt ./
# Another index has torch built for an older CUDA; its version stays the pinned one.
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint requirements_simple.txt torch \
    && pip install --no-cache-dir -r requirements_simple.txt

RUN useradd --create-home --uid 1000 trainer \
    && mkdir checkpoints data_cache logs reports exports /home/trainer/.cache \
    && chown trainer checkpoints data_cache logs reports exports /home/trainer/.cache
COPY . .

# NVIDIA_: what the toolkit hands to a container whose image is not NVIDIA's. _DIR: compiled code outlives a container.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/home/trainer/.cache/inductor \
    TRITON_CACHE_DIR=/home/trainer/.cache/triton \
    PYTHONDONTWRITEBYTECODE=1
USER 1000
VOLUME ["/app/checkpoints", "/app/data_cache", "/app/logs", "/home/trainer/.cache"]

# The supervisor restarts what hangs by itself; unhealthy means that it could not.
HEALTHCHECK --interval=60s --timeout=30s --start-period=20m --retries=3 CMD ["python", "-m", "runtime.health"]
# SIGTERM saves at the next safe point and ends with 0: give it the time (compose.yaml: stop_grace_period).
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "runtime.supervisor"]
