# gptlab on the CPU, with the lock's versions. docs/how-to.md says how to build and run it.
FROM python:3.11-slim-bookworm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/gptlab
COPY setup.sh requirements.txt pyproject.toml README.md LICENSE ./
COPY experiments experiments
COPY gptlab gptlab
RUN bash setup.sh lock | sed 's/ --hash=[^ ]*//g' >locked.txt \
    && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' locked.txt)" \
    && pip install --no-cache-dir --constraint locked.txt . \
    && useradd --create-home --uid 1000 gptlab
USER 1000
WORKDIR /home/gptlab
RUN mkdir log data
CMD ["gptlab", "doctor"]
