"""Payload rate of one TCP connection: ``linkrate.py receive`` on one host, ``linkrate.py send HOST MEGABYTES`` on
another. The receiver prints ``ready``, then megabits per second from the first byte to the last."""

import socket
import sys
import time

PORT = 17771


def receive() -> None:
    with socket.create_server(("0.0.0.0", PORT)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        with connection:
            total = len(connection.recv(1 << 16))
            begin = time.perf_counter()
            while part := connection.recv(1 << 16):
                total += len(part)
            print(total * 8e-6 / (time.perf_counter() - begin))


def send(host: str, megabytes: float) -> None:
    with socket.create_connection((host, PORT), timeout=10) as connection:
        connection.sendall(bytes(int(megabytes * 1e6)))


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive()
    else:
        send(sys.argv[2], float(sys.argv[3]))
