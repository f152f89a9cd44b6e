#!/usr/bin/python3
"""Makes trust anchors and issuers under them."""

import argparse
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import serialization

import certify


def load(path):
    certificate = x509.load_pem_x509_certificate(pathlib.Path(f"{path}.crt").read_bytes())
    key = pathlib.Path(f"{path}.key").read_bytes()
    return certificate, serialization.load_pem_private_key(key, password=None)


def anchor(options):
    since, until = certify.ago(options.since), certify.ago(options.until)
    made = certify.authority(options.name, since, until)
    certify.write(options.path, made[0])
    certify.write_key(options.path, made[1])


def issuer(options):
    above, above_key = load(options.under)
    since, until = certify.ago(options.since), certify.ago(options.until)
    made = certify.authority(options.name, since, until, above.subject, above_key)
    certify.write(options.path, made[0])
    certify.write_key(options.path, made[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(required=True)
    for make in (anchor, issuer):
        kind = kinds.add_parser(make.__name__)
        kind.set_defaults(make=make)
        kind.add_argument("path", help="path of the files without .crt and .key")
        kind.add_argument("--name", required=True)
        kind.add_argument("--since", type=float, default=3600, help="seconds ago that it begins")
        kind.add_argument("--until", type=float, default=-86400, help="seconds ago that it ended")
        if make is issuer:
            kind.add_argument("--under", required=True, help="the authority that signs it")
    options = parser.parse_args()
    options.make(options)


if __name__ == "__main__":
    main()
