"""The ids of a text file, for the trainers and evaluate.py: the documents are prepare.py's."""

import numpy as np

from corpus.documents import read_documents


def read_text(path):  # -> [str], the documents
    """Read a file's documents, in any format of corpus/documents.py, without empty ones.

    Raises ValueError or OSError, which name the file, if it cannot be read.
    """
    return list(read_documents(path))


def encode_text(documents, encoder):  # [str] -> [n_ids] int32
    """Encode documents. The id of <|endoftext|> follows each of several, as in prepare.py's shards.

    It does not follow a single one, nor where the tokenizer has no <|endoftext|>.
    """
    arrays = []
    for document in documents:
        ids = encoder.encode(document)
        if len(documents) > 1 and encoder.endoftext is not None:
            ids.append(encoder.endoftext)
        arrays.append(np.array(ids, np.int32))
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
