"""Create a user of the tracking server, where it is missing. Run me: python add_user.py NAME.

Its password is the secret mlflow_NAME_password. It may make experiments and sees no others' (mlflow-auth.ini), which
is all that training needs; the admin's password then stays with the server.
"""

import json
import sys
import urllib.error

from mlflow_api import call, secret


def add_user(name: str) -> str:
    """What became of it, in words.

    Raises:
        urllib.error.HTTPError: the server refuses, for example a password that is too short.
        OSError: the server does not answer, or there is no such secret.
    """
    body = {"username": name, "password": secret(f"mlflow_{name}_password")}
    try:
        call("POST", "/api/2.0/mlflow/users/create", body)
    except urllib.error.HTTPError as error:
        if json.loads(error.read()).get("error_code") != "RESOURCE_ALREADY_EXISTS":
            raise
        return f"user {name} was there"
    return f"user {name} is made"


if __name__ == "__main__":
    try:
        sys.stdout.write(add_user(sys.argv[1]) + "\n")
    except OSError as error:
        sys.exit(f"user {sys.argv[1]} was not made: {error}")
