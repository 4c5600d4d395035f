# gptlab with the lock's versions, on the CPU or, with --build-arg DEVICE=cuda, on NVIDIA GPUs: there PyTorch brings CUDA's
# libraries and the host its driver. docs/how-to.md says how to build and run it.
FROM python:3.11-slim-bookworm
ARG DEVICE=cpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# torch.compile, which a GPU runs with, needs a C compiler.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then \
    apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
WORKDIR /opt/gptlab
COPY setup.sh requirements.txt pyproject.toml README.md LICENSE ./
COPY experiments experiments
COPY gptlab gptlab
RUN bash setup.sh lock | sed 's/ --hash=[^ ]*//g' >locked.txt \
    && if [ "$DEVICE" = cpu ]; then \
    pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' locked.txt)"; fi \
    && pip install --no-cache-dir --constraint locked.txt . \
    && useradd --create-home --uid 1000 gptlab
USER 1000
WORKDIR /home/gptlab
RUN mkdir log data
CMD ["gptlab", "doctor"]
