// A client of trimtab.v1.RewardService: texts in, scores out. The messages are read from the .proto files themselves.

import { fileURLToPath } from "node:url";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../../protos", import.meta.url));

export interface Pair {
  prompt: string;
  response: string;
}

export interface Scores {
  /** The bare logits, one a pair. */
  scores: number[];
  /** (score - mean) / deviation, with the version's own constants. */
  normalizedScores: number[];
  /** Which weights answered: "run/name@step", or the name of a model that was never published. */
  version: string;
}

export interface Options {
  /** PEM authorities of the server's certificate; without them the connection is plaintext. */
  ca?: Buffer;
  /** A bearer token. It travels over TLS, or to this machine. */
  token?: string;
  /** Seconds until a call is given up. */
  timeoutS?: number;
}

interface ScoreResponse {
  scores: Buffer;
  normalizedScores: Buffer;
  version: { runId: string; name: string; step: string } | null;
}

type ScoreMethod = (
  request: object,
  metadata: grpc.Metadata,
  options: grpc.CallOptions,
  callback: (error: grpc.ServiceError | null, response?: ScoreResponse) => void,
) => grpc.ClientUnaryCall;

export class RewardClient {
  private readonly stub: grpc.Client & { score: ScoreMethod };
  private readonly metadata = new grpc.Metadata();
  private readonly timeoutS: number;

  constructor(address: string, options: Options = {}) {
    const definition = protoLoader.loadSync("trimtab/v1/reward.proto", { includeDirs: [PROTOS], longs: String });
    const root = grpc.loadPackageDefinition(definition) as any;
    const credentials = options.ca ? grpc.credentials.createSsl(options.ca) : grpc.credentials.createInsecure();
    // Behind a name with several addresses each replica gets its share of the calls.
    const balanced = { "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }) };
    this.stub = new root.trimtab.v1.RewardService(address, credentials, balanced);
    this.timeoutS = options.timeoutS ?? 60;
    if (options.token) this.metadata.set("authorization", `Bearer ${options.token}`);
  }

  /** Scores (prompt, response) texts by the server's own tokenizer. Rejects with a grpc.ServiceError. */
  scoreTexts(pairs: Pair[]): Promise<Scores> {
    const deadline = new Date(Date.now() + 1000 * this.timeoutS);
    return new Promise((resolve, reject) => {
      this.stub.score({ texts: { items: pairs } }, this.metadata, { deadline }, (error, response) => {
        if (error || !response) reject(error);
        else resolve(read(response));
      });
    });
  }

  close(): void {
    this.stub.close();
  }
}

function read(response: ScoreResponse): Scores {
  const { runId, name, step } = response.version ?? { runId: "", name: "", step: "0" };
  return {
    scores: floats(response.scores),
    normalizedScores: floats(response.normalizedScores),
    version: runId ? `${runId}/${name}@${step}` : name,
  };
}

/** Little-endian float32 values. */
function floats(bytes: Buffer): number[] {
  return Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readFloatLE(4 * index));
}
