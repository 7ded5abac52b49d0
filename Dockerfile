ARG BASE=python:3.13-slim

FROM ${BASE} AS tested
WORKDIR /app
COPY . .
RUN ["python", "-m", "unittest"]

FROM ${BASE}
LABEL org.opencontainers.image.title="health_check.py" \
      org.opencontainers.image.description="Prometheus alert rules as a Kubernetes readiness probe" \
      org.opencontainers.image.licenses="MIT"
WORKDIR /app
COPY --from=tested --chmod=444 /app/health_check.py /app/LICENSE ./
# The base image comes without byte code and the user below cannot write any: without
# this run, every start and every probe would compile the standard library again.
RUN ["python", "-I", "health_check.py", "--check-config"]
USER 65532:65532
EXPOSE 8081
STOPSIGNAL SIGTERM
# /livez is about this process only: Docker's verdict must not follow the server's load.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s \
    CMD ["python", "-I", "/app/health_check.py", "--probe", "/livez"]
# -I keeps PYTHON* variables and stray modules out; it drops PYTHONUNBUFFERED too, hence -u.
ENTRYPOINT ["python", "-I", "-u", "/app/health_check.py"]
