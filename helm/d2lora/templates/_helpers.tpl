{{- define "d2lora.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "d2lora.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "d2lora.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "d2lora.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* What the chart's pods are found by; it may not change between releases. */ -}}
{{- define "d2lora.selector" -}}
app.kubernetes.io/name: {{ include "d2lora.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "d2lora.labels" -}}
{{ include "d2lora.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "d2lora.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "d2lora.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* Arguments: root, image (repository, digest, tag). */ -}}
{{- define "d2lora.image" -}}
{{- $repository := .image.repository -}}
{{- if .root.Values.image.registry -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .root.Values.image.registry) $repository -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.image.tag | default .root.Values.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "d2lora.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "d2lora.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- /* Arguments: name, value. Nothing when the value is null, so that the program's own default stays. */ -}}
{{- define "d2lora.optional" -}}
{{- if not (kindIs "invalid" .value) }}
- name: {{ .name }}
  {{- /* Numbers from JSON are floats; %v would write a million as 1e+06, which an integer setting refuses. */}}
  {{- if and (kindIs "float64" .value) (eq (float64 (int64 .value)) .value) }}
  value: {{ int64 .value | toString | quote }}
  {{- else }}
  value: {{ .value | toString | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "d2lora.databaseEnv" -}}
- name: D2LORA_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ required "database.existingSecret: the name of a Secret with the database's URL is needed" .Values.database.existingSecret }}
      key: {{ .Values.database.key }}
{{- end -}}

{{- define "d2lora.commonEnv" -}}
{{ include "d2lora.databaseEnv" . }}
{{- if .Values.broker.existingSecret }}
- name: D2LORA_BROKER_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.broker.existingSecret }}, key: {{ .Values.broker.key }}}}
{{- end }}
- name: D2LORA_STORAGE_BUCKET
  value: {{ required "storage.bucket: the name of a bucket is needed" .Values.storage.bucket | quote }}
- name: D2LORA_STORAGE_REGION
  value: {{ .Values.storage.region | quote }}
{{- with .Values.storage.endpointUrl }}
- name: D2LORA_STORAGE_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.storage.publicEndpointUrl }}
- name: D2LORA_STORAGE_PUBLIC_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.storage.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.storage.accessKeyIdKey }}}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.storage.secretAccessKeyKey }}}}
{{- end }}
{{- end -}}

{{- /* Arguments: root, component. Spread over nodes and zones, but never wait for a better place. */ -}}
{{- define "d2lora.spread" -}}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "d2lora.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end -}}

{{- /* Arguments: the placement values of the API or of a class of workers. */ -}}
{{- define "d2lora.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- /* The enabled classes of workers with their defaults filled in, as YAML. */ -}}
{{- define "d2lora.workers" -}}
{{- range $name, $given := .Values.workers }}
{{- $class := mergeOverwrite (deepCopy $.Values.workerDefaults) (deepCopy ($given | default dict)) }}
{{- if $class.enabled }}
{{ $name }}: {{- toYaml $class | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
