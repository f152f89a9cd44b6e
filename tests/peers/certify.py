#!/usr/bin/python3
"""Makes a certificate with a key, signed by the authority in a folder or by one made up for it."""

import argparse
import datetime
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PURPOSES = {
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
}


def ago(seconds):
    return datetime.datetime.utcnow() - datetime.timedelta(seconds=seconds)


def builder(subject, issuer, key, since, until):
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(until)
    )


def authority(name, since, until, above=None, above_key=None):
    """An authority that signs leaves: a trust anchor, or what the name and key `above` certify."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        builder(subject, above or subject, key, since, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .sign(above_key or key, hashes.SHA256())
    )
    return certificate, key


def leaf(issuer, issuer_key, options):
    key = ec.generate_private_key(ec.SECP256R1())
    since, until = ago(options.since), ago(options.until)
    made = builder(x509.Name([]), issuer.subject, key, since, until)
    if options.uri:
        names = [x509.UniformResourceIdentifier(uri) for uri in options.uri]
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=True)
    purposes = [PURPOSES[purpose] for purpose in options.purposes.split(",")]
    made = made.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    issuer_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    made = made.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id.value),
        critical=False,
    )
    return made.sign(issuer_key, hashes.SHA256()), key


def write(path, *certificates):
    pem = b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)
    pathlib.Path(f"{path}.crt").write_bytes(pem)


def write_key(path, key):
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file = pathlib.Path(f"{path}.key")
    file.touch(mode=0o600)
    file.write_bytes(pem)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="path of the files without .crt and .key")
    parser.add_argument("--authority", type=pathlib.Path, help="folder of the issuer's files")
    parser.add_argument("--uri", action="append", help="a name in the certificate")
    parser.add_argument("--since", type=float, default=60, help="seconds ago that it begins")
    parser.add_argument("--until", type=float, default=-3600, help="seconds ago that it ended")
    parser.add_argument("--purposes", default="client,server")
    parser.add_argument("--anchor", action="store_true", help="make a trust anchor instead")
    options = parser.parse_args()
    if options.anchor:
        certificate, key = authority("test anchor", ago(options.since), ago(options.until))
        write(options.path, certificate)
        write_key(options.path, key)
        return
    if options.authority:
        chain = (options.authority / "issuer.crt").read_bytes()
        issuer = x509.load_pem_x509_certificate(chain)
        pem = (options.authority / "issuer.key").read_bytes()
        issuer_key = serialization.load_pem_private_key(pem, password=None)
    else:
        issuer, issuer_key = authority("nobody's anchor", ago(86400), ago(-86400))
    certificate, key = leaf(issuer, issuer_key, options)
    write(options.path, certificate, issuer)
    write_key(options.path, key)


if __name__ == "__main__":
    main()
